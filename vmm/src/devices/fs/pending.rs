//! The requests that the server has not answered yet, by the tags that stand for them.

use super::buffer::Buffer;

/// Requests at most that wait for an answer. What is beyond stays in the rings. The guest's kernel has some dozen of its own on the way
/// besides one of each of its threads that waits.
pub(super) const PENDING_MAX: usize = 1 << INDEX_BITS;

/// A tag is a number that counts requests, and below it the place in the table.
const INDEX_BITS: u32 = 8;

/// What a request is to be answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Bytes.
    Bytes,
    /// Bytes and, when they tell of success, a file whose handle is at this place in them.
    File { handle_at: usize },
    /// An error: it asked for a file that has been taken back since.
    Nothing,
}

/// A request that the server works on.
#[derive(Debug)]
pub(super) struct Request {
    /// The queue and the head of its chain.
    pub(super) queue: usize,
    pub(super) head: u16,
    /// What the driver calls it.
    pub(super) unique: u64,
    pub(super) expected: Expected,
}

/// One place in the table.
#[derive(Debug)]
struct Place {
    /// Zero when it is free: no request has that tag.
    tag: u64,
    request: Request,
    /// Where the answer goes.
    room: Buffer,
}

/// The table. Places come to be when they are first needed, and keep their buffers' lists.
#[derive(Debug, Default)]
pub(super) struct Pending {
    places: Vec<Place>,
    /// Places that are free, the one that was used last at the end.
    free: Vec<u16>,
    /// Requests so far. 56 bits of it never repeat: at one request a nanosecond they last for two years, and the guest's exits cost a
    /// thousand times that.
    count: u64,
    files: usize,
}

impl Pending {
    /// True when nothing is on the way.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.places.len()
    }

    /// Files that are on the way.
    pub(super) fn files(&self) -> usize {
        self.files
    }

    /// A tag for a request whose answer nobody waits for.
    pub(super) fn lone_tag(&mut self) -> u64 {
        self.count += 1;
        self.count << INDEX_BITS
    }

    /// The tag of a next request, unless the table is full.
    pub(super) fn next_tag(&mut self) -> Option<u64> {
        let index = match self.free.last() {
            Some(index) => u64::from(*index),
            None if self.places.len() < PENDING_MAX => self.places.len() as u64,
            None => return None,
        };
        Some(self.lone_tag() | index)
    }

    /// The request with the last [`next_tag`](Self::next_tag) has been sent. `room` is exchanged for one that is not in use.
    pub(super) fn insert(&mut self, tag: u64, request: Request, room: &mut Buffer) {
        self.files += usize::from(matches!(request.expected, Expected::File { .. }));
        match self.free.pop() {
            Some(index) => {
                let place = &mut self.places[usize::from(index)];
                std::mem::swap(&mut place.room, room);
                place.tag = tag;
                place.request = request;
            }
            None => self.places.push(Place { tag, request, room: std::mem::take(room) }),
        }
    }

    /// The request with this tag, which is pending no longer, and the room for its answer.
    pub(super) fn take(&mut self, tag: u64) -> Option<(&Request, &Buffer)> {
        let index = usize::try_from(tag).ok()? % PENDING_MAX;
        if tag == 0 || self.places.get(index)?.tag != tag {
            return None;
        }
        Some(self.vacate(index))
    }

    /// Any request, which is pending no longer, and the room for its answer.
    pub(super) fn take_any(&mut self) -> Option<(&Request, &Buffer)> {
        let index = self.places.iter().position(|place| place.tag != 0)?;
        Some(self.vacate(index))
    }

    fn vacate(&mut self, index: usize) -> (&Request, &Buffer) {
        let place = &mut self.places[index];
        place.tag = 0;
        self.free.push(u16::try_from(index).expect("below PENDING_MAX"));
        self.files -= usize::from(matches!(place.request.expected, Expected::File { .. }));
        (&place.request, &place.room)
    }

    /// The files that are on the way come too late.
    pub(super) fn refuse_files(&mut self) {
        for place in self.places.iter_mut().filter(|place| place.tag != 0) {
            if let Expected::File { .. } = place.request.expected {
                place.request.expected = Expected::Nothing;
            }
        }
        self.files = 0;
    }

    /// Forgets all requests. The answers to them will be to nothing, since their tags never come again.
    pub(super) fn clear(&mut self) {
        self.places = Vec::new();
        self.free = Vec::new();
        self.files = 0;
    }
}
