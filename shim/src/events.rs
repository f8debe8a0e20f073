//! Events: published in their order, with patience, to the containerd that started the shim.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task as messages;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::{MessageField, MessageFull};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

use crate::any::pack;
use crate::errors::chain;

/// Longest time that one try may take.
const TRY: Duration = Duration::from_secs(5);
/// How often an event is tried. Before the n-th further try, n seconds go by.
const TRIES: u32 = 5;
/// Most events that wait: a containerd that is gone for hours must not cost memory.
const WAITING_MAX: usize = 4096;

/// What happened, in the words of containerd's topics.
pub(crate) trait TaskEvent: MessageFull {
    /// The topic.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ident $topic:literal),* $(,)?) => {
        $(impl TaskEvent for messages::$event {
            const TOPIC: &'static str = $topic;
        })*
    };
}

topics! {
    TaskCreate "/tasks/create",
    TaskStart "/tasks/start",
    TaskOOM "/tasks/oom",
    TaskExit "/tasks/exit",
    TaskDelete "/tasks/delete",
    TaskExecAdded "/tasks/exec-added",
    TaskExecStarted "/tasks/exec-started",
    TaskPaused "/tasks/paused",
    TaskResumed "/tasks/resumed",
}

/// Where events are put.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    queue: mpsc::UnboundedSender<Item>,
    waiting: Arc<AtomicUsize>,
}

/// What waits to be sent.
#[derive(Debug)]
pub(crate) enum Item {
    /// An event.
    Event(Event),
    /// Somebody who wants to know when everything before has been sent or given up.
    Flush(oneshot::Sender<()>),
}

/// An event.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) topic: &'static str,
    pub(crate) at: SystemTime,
    pub(crate) body: Any,
}

impl Publisher {
    /// A publisher, and what takes from it: [`forward`], or a test.
    pub(crate) fn new() -> (Self, Queue) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        (Self { queue: sender, waiting: Arc::clone(&waiting) }, Queue { receiver, waiting })
    }

    /// Puts an event behind those that wait. It never waits itself.
    pub(crate) fn publish<E: TaskEvent>(&self, event: &E) {
        if self.waiting.load(Ordering::Relaxed) >= WAITING_MAX {
            tracing::error!(
                topic = E::TOPIC,
                "an event is lost: containerd takes none, and too many wait for it"
            );
            return;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let event = Event { topic: E::TOPIC, at: SystemTime::now(), body: pack(event) };
        // Nobody takes events any more only when the shim is about to end.
        let _ = self.queue.send(Item::Event(event));
    }

    /// Waits until everything that has been published so far is sent or given up.
    pub(crate) async fn flush(&self) {
        let (done, is_done) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() {
            let _ = is_done.await;
        }
    }
}

/// The events that wait.
#[derive(Debug)]
pub(crate) struct Queue {
    receiver: mpsc::UnboundedReceiver<Item>,
    waiting: Arc<AtomicUsize>,
}

impl Queue {
    /// The next event, when there is one.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            match self.receiver.recv().await? {
                Item::Event(event) => {
                    self.waiting.fetch_sub(1, Ordering::Relaxed);
                    return Some(event);
                }
                Item::Flush(done) => drop(done.send(())),
            }
        }
    }
}

/// Where containerd takes events.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    /// Its socket; without one, nobody wants events.
    pub(crate) socket: Option<PathBuf>,
    /// The namespace that the events are of.
    pub(crate) namespace: String,
    /// The unit of the time between two tries.
    pub(crate) pause: Duration,
}

/// Sends events, one after the other, for as long as there is a publisher.
pub(crate) async fn forward(mut queue: Queue, destination: Destination) {
    let mut connection = None;
    while let Some(event) = queue.next().await {
        let Some(socket) = &destination.socket else { continue };
        let envelope = Envelope {
            timestamp: MessageField::some(event.at.into()),
            namespace: destination.namespace.clone(),
            topic: event.topic.into(),
            event: MessageField::some(event.body),
            ..Default::default()
        };
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        let mut tries = 0;
        loop {
            let reused = connection.is_some();
            let Err(error) = send(&mut connection, socket, &request).await else { break };
            connection = None;
            // A connection of before may have been to a containerd that has been restarted since.
            if reused {
                continue;
            }
            tries += 1;
            if tries == TRIES {
                tracing::error!(topic = event.topic, %error, "an event is lost");
                break;
            }
            tracing::debug!(topic = event.topic, %error, "an event is sent once more");
            sleep(destination.pause * tries).await;
        }
    }
}

async fn send(
    connection: &mut Option<EventsClient>,
    socket: &PathBuf,
    request: &ForwardRequest,
) -> Result<(), String> {
    let connect = || async {
        let stream = UnixStream::connect(socket).await?;
        io::Result::Ok(EventsClient::new(Client::new(Socket::from(stream))))
    };
    let sending = async {
        let client = match connection {
            Some(client) => client,
            None => connection.insert(connect().await.map_err(|e| chain(&e))?),
        };
        client.forward(context::with_duration(TRY), request).await.map_err(|e| chain(&e))
    };
    match timeout(TRY, sending).await {
        Ok(sent) => sent.map(drop),
        Err(_) => Err(format!("no answer within {TRY:?}")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    /// containerd's end: refuses as often as it is told, and keeps the rest.
    #[derive(Default)]
    struct Containerd {
        refuse: AtomicUsize,
        taken: Mutex<Vec<Envelope>>,
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let refuse = self.refuse.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            if refuse.is_ok() {
                return Err(ttrpc::Error::Others("not now".into()));
            }
            self.taken.lock().unwrap().push(request.envelope.unwrap());
            Ok(Empty::new())
        }
    }

    async fn serve(socket: &std::path::Path, containerd: &Arc<Containerd>) -> Server {
        let _ = std::fs::remove_file(socket);
        let service = create_events(Arc::clone(containerd) as Arc<dyn Events + Send + Sync>);
        let address = format!("unix://{}", socket.display());
        let mut server = Server::new().bind(&address).unwrap().register_service(service);
        server.start().await.unwrap();
        server
    }

    fn publisher(socket: Option<PathBuf>) -> Publisher {
        let (publisher, queue) = Publisher::new();
        let pause = Duration::from_millis(1);
        tokio::spawn(forward(queue, Destination { socket, namespace: "ns".into(), pause }));
        publisher
    }

    fn start(id: &str) -> messages::TaskStart {
        messages::TaskStart { container_id: id.into(), ..Default::default() }
    }

    #[tokio::test]
    async fn events_arrive_in_their_order_although_some_have_to_be_sent_again() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("events");
        let containerd = Arc::new(Containerd { refuse: AtomicUsize::new(3), ..Default::default() });
        let mut server = serve(&socket, &containerd).await;
        let publisher = publisher(Some(socket.clone()));
        publisher.publish(&start("1"));
        publisher.publish(&start("2"));
        publisher.flush().await;
        server.shutdown().await.unwrap();
        // Restarted: the old connection is of no use any more.
        let _server = serve(&socket, &containerd).await;
        publisher.publish(&messages::TaskExit { container_id: "3".into(), ..Default::default() });
        publisher.flush().await;
        let taken = containerd.taken.lock().unwrap();
        let topics: Vec<&str> = taken.iter().map(|envelope| envelope.topic.as_str()).collect();
        assert_eq!(topics, ["/tasks/start", "/tasks/start", "/tasks/exit"]);
        assert!(taken[0].event.value.ends_with(b"1") && taken[1].event.value.ends_with(b"2"));
        assert_eq!(
            (taken[2].namespace.as_str(), taken[2].event.type_url.as_str()),
            ("ns", "containerd.events.TaskExit")
        );
        assert!(taken[2].timestamp.seconds > 0);
    }

    #[tokio::test]
    async fn an_event_that_nobody_takes_is_given_up_and_the_next_one_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("events");
        let containerd =
            Arc::new(Containerd { refuse: AtomicUsize::new(TRIES as usize), ..Default::default() });
        let _server = serve(&socket, &containerd).await;
        let publisher = publisher(Some(socket));
        publisher.publish(&start("lost"));
        publisher.publish(&start("kept"));
        publisher.flush().await;
        let taken = containerd.taken.lock().unwrap();
        assert_eq!(taken.len(), 1);
        assert!(taken[0].event.value.ends_with(b"kept"));
    }

    #[tokio::test]
    async fn without_an_address_events_go_nowhere_and_nobody_waits() {
        let publisher = publisher(None);
        for _ in 0..2 * WAITING_MAX {
            publisher.publish(&start("a"));
        }
        publisher.flush().await;
        publisher.publish(&start("a"));
        publisher.flush().await;
    }
}
