//! Flow control, 5.10.6.3 of the standard: who may send how many bytes, in both directions of one connection.
//!
//! All counters are free-running and wrap. Those that the guest sends can hold anything: the worst that they do is to let data flow into
//! the guest's own buffers, or to keep it from there.

use super::packet::Header;

/// Bytes of one connection that the device keeps for a host program that does not read: the `buf_alloc` that it tells the guest. Two of
/// the largest packets that Linux sends, so that one is on its way while the other is being forwarded.
pub(super) const BUF_ALLOC: u32 = 128 << 10;

/// How much is forwarded before the guest is told: one packet of the largest size. Until then at least as much is left to it.
const UPDATE_STEP: u32 = BUF_ALLOC / 2;

/// The account of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Credit {
    received: u32,
    forwarded: u32,
    reported: u32,
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
    update: Update,
    request: Request,
}

/// Whether the guest is waiting for an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Update {
    #[default]
    Unasked,
    Asked,
}

/// Whether the device is waiting for an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Request {
    #[default]
    Unsent,
    Sent,
}

impl Credit {
    /// Counts bytes that the guest sent. False when it was not allowed to send them.
    pub(super) fn received(&mut self, length: u32) -> bool {
        // What the guest has not been told of it cannot have used, so this also bounds what is kept.
        let used = self.received.wrapping_sub(self.reported);
        let allowed = length <= BUF_ALLOC - used;
        if allowed {
            self.received = self.received.wrapping_add(length);
        }
        allowed
    }

    /// Counts received bytes that need no room any more.
    pub(super) fn forwarded(&mut self, length: usize) {
        let length = u32::try_from(length).expect("no more than was received, which BUF_ALLOC bounds");
        self.forwarded = self.forwarded.wrapping_add(length);
    }

    /// The guest wants to know how much it may send.
    pub(super) fn asked(&mut self) {
        self.update = Update::Asked;
    }

    /// True when the guest should be told how much it may send.
    pub(super) fn update_due(&self) -> bool {
        self.update == Update::Asked || self.forwarded.wrapping_sub(self.reported) >= UPDATE_STEP
    }

    /// Puts the account into a packet for the guest, which is what tells it.
    pub(super) fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = BUF_ALLOC;
        header.fwd_cnt = self.forwarded;
        self.reported = self.forwarded;
        self.update = Update::Unasked;
    }

    /// Takes the guest's account out of a packet from it.
    pub(super) fn peer(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        if self.available() > 0 {
            self.request = Request::Unsent;
        }
    }

    /// Bytes that may be sent to the guest.
    pub(super) fn available(&self) -> u32 {
        // A driver may shrink its buffer below what is on its way.
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Counts bytes sent to the guest.
    pub(super) fn sent(&mut self, length: u32) {
        self.sent = self.sent.wrapping_add(length);
    }

    /// True when the device should ask the guest for credit: once each time that it has run out.
    pub(super) fn request_due(&self) -> bool {
        self.available() == 0 && self.request == Request::Unsent
    }

    /// The guest has been asked.
    pub(super) fn requested(&mut self) {
        self.request = Request::Sent;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_guest(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { buf_alloc, fwd_cnt, ..Header::default() }
    }

    #[test]
    fn the_guest_may_send_what_it_was_told_and_no_more() {
        let mut credit = Credit::default();
        assert!(credit.received(BUF_ALLOC));
        assert!(!credit.received(1));
        credit.forwarded(1000);
        assert!(!credit.received(1), "it has not been told");
        credit.stamp(&mut Header::default());
        assert!(!credit.received(1001));
        assert!(credit.received(1000));
        assert!(!credit.received(u32::MAX));
    }

    #[test]
    fn counters_wrap() {
        let mut credit = Credit {
            received: u32::MAX - 5,
            forwarded: u32::MAX - 5,
            reported: u32::MAX - 5,
            ..Credit::default()
        };
        assert!(credit.received(10));
        credit.forwarded(10);
        let mut header = Header::default();
        credit.stamp(&mut header);
        assert_eq!(header.fwd_cnt, 4);
        assert!(credit.received(BUF_ALLOC));

        let mut credit = Credit { sent: u32::MAX - 5, ..Credit::default() };
        credit.peer(&from_guest(100, u32::MAX - 5));
        credit.sent(50);
        assert_eq!(credit.available(), 50);
        credit.peer(&from_guest(100, 44));
        assert_eq!(credit.available(), 100);
    }

    #[test]
    fn the_guest_is_told_when_half_its_credit_can_be_renewed_or_when_it_asks() {
        let mut credit = Credit::default();
        assert!(credit.received(BUF_ALLOC));
        credit.forwarded(UPDATE_STEP as usize - 1);
        assert!(!credit.update_due());
        credit.forwarded(1);
        assert!(credit.update_due());
        credit.stamp(&mut Header::default());
        assert!(!credit.update_due());
        credit.asked();
        assert!(credit.update_due());
    }

    #[test]
    fn a_guest_that_shrinks_its_buffer_or_counts_backwards_gets_nothing() {
        let mut credit = Credit::default();
        credit.peer(&from_guest(1000, 0));
        credit.sent(800);
        credit.peer(&from_guest(100, 0));
        assert_eq!(credit.available(), 0);
        credit.peer(&from_guest(1000, 801));
        assert_eq!(credit.available(), 0, "it claims to have consumed more than was sent");
    }

    #[test]
    fn credit_is_asked_for_once_each_time_it_runs_out() {
        let mut credit = Credit::default();
        assert!(credit.request_due());
        credit.requested();
        assert!(!credit.request_due());
        credit.peer(&from_guest(0, 0));
        assert!(!credit.request_due(), "an answer without credit must not start a loop");
        credit.peer(&from_guest(10, 0));
        assert!(!credit.request_due());
        credit.sent(10);
        assert!(credit.request_due());
    }
}
