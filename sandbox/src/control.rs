//! The owner's side of a VMM's control socket.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_vmm::control::message::{Event, FromOwner, FromVmm, Reply, Request, STATUS_EVENTS_MAX};
use bulkhead_vmm::control::socket::{ControlSocket, SocketError};
use nix::errno::Errno;
use rustix::io::ioctl_fionbio;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::console::excerpt;
use crate::watch::watch_owner;

/// How long a VMM may take to make a machine.
const BOOT_TIMEOUT: Duration = Duration::from_mins(1);
/// How long it may take for any other request.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a request was not answered as hoped.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed; mostly because the VMM has ended.
    #[error("the VMM does not answer")]
    Socket(#[from] SocketError),
    /// The VMM refused.
    #[error("the VMM cannot {what}: {why}")]
    Refused {
        /// What it was asked.
        what: &'static str,
        /// Its own words.
        why: String,
    },
    /// The VMM hangs.
    #[error("the VMM cannot {0}: it does not answer within {1:?}")]
    Timeout(&'static str, Duration),
    /// The VMM answered something that does not fit what was asked.
    #[error("the VMM broke the protocol: {0}")]
    Protocol(&'static str),
}

type Answer = Result<Reply, String>;

/// Requests that wait for their answers, oldest first: the VMM answers in order.
#[derive(Debug, Default)]
struct Waiting {
    next_id: u32,
    queue: VecDeque<(u32, oneshot::Sender<Answer>)>,
    closed: bool,
}

/// The socket to one VMM. Dropped, it is closed, which ends the VMM.
#[derive(Debug)]
pub struct Control {
    socket: Arc<AsyncFd<ControlSocket>>,
    waiting: Arc<Mutex<Waiting>>,
    reader: JoinHandle<()>,
}

fn locked(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// Takes over the owner's end. The receiver yields the VMM's events and ends when the socket does.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking or watched.
    pub fn new(socket: ControlSocket) -> std::io::Result<(Self, mpsc::Receiver<Event>)> {
        ioctl_fionbio(&socket, true)?;
        let socket = Arc::new(watch_owner(socket, Interest::READABLE)?);
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        // Room for every event that a machine may cause in its life, so that reading never waits.
        let room = usize::try_from(STATUS_EVENTS_MAX).unwrap_or(usize::MAX) + 1;
        let (events, receiver) = mpsc::channel(room);
        let reader = tokio::spawn(read(Arc::clone(&socket), Arc::clone(&waiting), events));
        Ok((Self { socket, waiting, reader }, receiver))
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// [`ControlError`] when the VMM refuses, hangs or has ended.
    pub async fn request(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, ControlError> {
        let what = name(&request);
        let patience =
            if matches!(request, Request::Boot(_) | Request::Restore(_)) { BOOT_TIMEOUT } else { PATIENCE };
        let (sender, receiver) = oneshot::channel();
        let message = {
            let mut waiting = locked(&self.waiting);
            if waiting.closed {
                return Err(SocketError::Closed.into());
            }
            let id = waiting.next_id;
            waiting.next_id = id.wrapping_add(1);
            waiting.queue.push_back((id, sender));
            FromOwner { id, request }
        };
        // Requests are few and small, the socket's buffer takes many: what does not fit is no request of ours.
        if let Err(error) = self.socket.get_ref().send(&message, fds) {
            locked(&self.waiting).queue.retain(|(id, _)| *id != message.id);
            return Err(error.into());
        }
        // A request that is given up stays in its place, for its answer may come yet.
        match timeout(patience, receiver).await {
            Ok(Ok(Ok(reply))) => Ok(reply),
            Ok(Ok(Err(why))) => Err(ControlError::Refused { what, why: excerpt(&why) }),
            Ok(Err(_)) => Err(SocketError::Closed.into()),
            Err(_) => Err(ControlError::Timeout(what, patience)),
        }
    }

    /// Asks the VMM to end at once. Not answered.
    pub fn stop(&self) {
        // A VMM that cannot be asked has ended.
        let _ = self.socket.get_ref().try_send(&FromOwner { id: u32::MAX, request: Request::Stop });
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn name(request: &Request) -> &'static str {
    match request {
        Request::Boot(_) => "boot the machine",
        Request::Restore(_) => "restore the machine",
        Request::Plug { .. } => "plug the device",
        Request::Unplug { .. } => "unplug the device",
        Request::AddVcpus { .. } => "add CPUs",
        Request::Pause => "pause the machine",
        Request::Resume => "resume the machine",
        Request::Save { .. } => "save the machine",
        Request::Stop => "stop",
    }
}

/// Hands out answers and events until the socket ends or the VMM breaks the protocol.
async fn read(
    socket: Arc<AsyncFd<ControlSocket>>,
    waiting: Arc<Mutex<Waiting>>,
    events: mpsc::Sender<Event>,
) {
    let mut room = events.max_capacity();
    loop {
        let Ok(mut ready) = socket.readable().await else { break };
        match socket.get_ref().receive::<FromVmm>() {
            Ok((FromVmm::Reply { id, reply }, _)) => {
                let first = locked(&waiting).queue.pop_front();
                match first {
                    Some((expected, sender)) if expected == id => drop(sender.send(reply)),
                    _ => break,
                }
            }
            // More events than a VMM may send in its life, whether or not somebody has taken them: it is not to be trusted any
            // more.
            Ok((FromVmm::Event(_), _)) if room == 0 => break,
            Ok((FromVmm::Event(event), _)) => {
                room -= 1;
                // Nobody waits for them after the last one.
                let _ = events.try_send(event);
            }
            Err(SocketError::Io(Errno::EAGAIN)) => ready.clear_ready(),
            Err(error) => {
                tracing::debug!(%error, "control socket ends");
                break;
            }
        }
    }
    let mut waiting = locked(&waiting);
    waiting.closed = true;
    waiting.queue.clear();
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm::control::message::Exit;

    use super::*;

    fn connected() -> (Control, mpsc::Receiver<Event>, ControlSocket) {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        let (control, events) = Control::new(ours).unwrap();
        (control, events, theirs)
    }

    fn answer(vmm: &ControlSocket, reply: Answer) -> Request {
        let (received, _) = vmm.receive::<FromOwner>().unwrap();
        vmm.send(&FromVmm::Reply { id: received.id, reply }, &[]).unwrap();
        received.request
    }

    #[tokio::test]
    async fn answers_reach_their_requests_while_events_pass_by() {
        let (control, mut events, vmm) = connected();
        let vmm = std::thread::spawn(move || {
            vmm.send(&FromVmm::Event(Event::Status(1)), &[]).unwrap();
            assert_eq!(answer(&vmm, Ok(Reply::Done)), Request::Pause);
            assert_eq!(answer(&vmm, Err("no\x1b".into())), Request::Resume);
            vmm
        });
        let (first, second) =
            tokio::join!(control.request(Request::Pause, &[]), control.request(Request::Resume, &[]));
        assert_eq!(first.unwrap(), Reply::Done);
        assert_eq!(second.unwrap_err().to_string(), "the VMM cannot resume the machine: no\\x1b");
        assert_eq!(events.recv().await, Some(Event::Status(1)));
        drop(vmm.join().unwrap());
        assert_eq!(events.recv().await, None);
    }

    #[tokio::test]
    async fn the_end_of_the_vmm_ends_waiting_and_later_requests() {
        let (control, mut events, vmm) = connected();
        let vmm = std::thread::spawn(move || {
            vmm.receive::<FromOwner>().unwrap();
            vmm.send(&FromVmm::Event(Event::Exited(Exit::TripleFault)), &[]).unwrap();
        });
        assert!(matches!(control.request(Request::Pause, &[]).await, Err(ControlError::Socket(_))));
        vmm.join().unwrap();
        assert_eq!(events.recv().await, Some(Event::Exited(Exit::TripleFault)));
        assert!(control.request(Request::Pause, &[]).await.is_err());
    }

    #[tokio::test]
    async fn an_answer_to_nothing_and_a_flood_of_events_end_the_connection() {
        let (_control, mut events, vmm) = connected();
        vmm.send(&FromVmm::Reply { id: 9, reply: Ok(Reply::Done) }, &[]).unwrap();
        assert_eq!(events.recv().await, None);

        let (control, _events, vmm) = connected();
        for _ in 0..STATUS_EVENTS_MAX + 3 {
            vmm.send(&FromVmm::Event(Event::Status(1)), &[]).unwrap();
        }
        assert!(control.request(Request::Pause, &[]).await.is_err());
    }

    #[tokio::test]
    async fn events_that_are_taken_as_they_come_are_a_flood_all_the_same() {
        let (_control, mut events, vmm) = connected();
        for _ in 0..=STATUS_EVENTS_MAX {
            vmm.send(&FromVmm::Event(Event::Status(1)), &[]).unwrap();
            assert_eq!(events.recv().await, Some(Event::Status(1)));
        }
        vmm.send(&FromVmm::Event(Event::Status(1)), &[]).unwrap();
        assert_eq!(events.recv().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_vmm_that_hangs_is_not_waited_for_and_may_answer_later() {
        let (control, _events, vmm) = connected();
        let error = control.request(Request::Pause, &[]).await.unwrap_err();
        assert_eq!(error.to_string(), "the VMM cannot pause the machine: it does not answer within 10s");
        // Time passes of itself again, and so not at all while the VMM answers.
        tokio::time::resume();
        let vmm = std::thread::spawn(move || {
            assert_eq!(answer(&vmm, Ok(Reply::Done)), Request::Pause);
            assert_eq!(answer(&vmm, Err("no".into())), Request::Resume);
            vmm
        });
        let error = control.request(Request::Resume, &[]).await.unwrap_err();
        assert!(matches!(error, ControlError::Refused { .. }), "{error}");
        drop(vmm.join().unwrap());
    }

    #[tokio::test]
    async fn dropping_the_control_closes_the_socket() {
        let (control, _events, vmm) = connected();
        drop(control);
        tokio::task::yield_now().await;
        assert!(matches!(vmm.receive::<FromOwner>(), Err(SocketError::Closed)));
    }
}
