//! What may take as long as a disk does: writing out, making room, copying. A thread of its own does it, one thing after the other, while
//! names and attributes are served.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Barrier, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use bulkhead_vmm::seccomp::keep_malloc_from_files;
use rustix::fs::{FallocateFlags, OFlags, copy_file_range, fallocate, fdatasync, fsync, syncfs};
use rustix::io::{Errno, write};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

use crate::host::OwnDescriptors;
use crate::seccomp::lock_down;
use crate::session::Reply;
use crate::wire::Writer;

/// What is on the way at most. It is more than a VMM asks for at a time; beyond it, whoever asks waits.
const JOBS_MAX: usize = 256;

/// Bytes of the thread's stack. It takes what it uses.
const STACK: usize = 256 << 10;

/// Something that may take long.
#[derive(Debug)]
pub enum Work {
    /// FSYNC, FSYNCDIR: of the data alone, or of all.
    Sync(Arc<OwnedFd>, bool),
    /// SYNCFS: the file systems of these files and directories, which are opened again one by one.
    SyncFileSystems(Vec<Arc<OwnedFd>>, OwnDescriptors),
    /// FALLOCATE
    Allocate {
        /// The file.
        file: Arc<OwnedFd>,
        /// How.
        mode: FallocateFlags,
        /// From where on.
        offset: u64,
        /// So many bytes.
        length: u64,
        /// By which its set-id bits are cleared.
        own: OwnDescriptors,
    },
    /// COPY_FILE_RANGE
    Copy {
        /// The file that is copied, and from where on.
        from: (Arc<OwnedFd>, u64),
        /// The file that is copied to, and where.
        to: (Arc<OwnedFd>, u64),
        /// So many bytes at most.
        length: usize,
        /// By which the other's set-id bits are cleared.
        own: OwnDescriptors,
    },
}

impl Work {
    /// Does it. Gives the body of the reply.
    fn perform(self) -> Result<Writer, Errno> {
        let mut reply = Writer::reply();
        match self {
            Self::Sync(file, true) => fdatasync(&*file)?,
            Self::Sync(file, false) => fsync(&*file)?,
            Self::SyncFileSystems(files, own) => {
                files.iter().try_for_each(|file| syncfs(own.reopen(&**file, OFlags::RDONLY)?))?;
            }
            Self::Allocate { file, mode, offset, length, own } => {
                fallocate(&*file, mode, offset, length)?;
                own.clear_set_id(&*file)?;
            }
            Self::Copy { from: (from, mut from_offset), to: (to, mut to_offset), length, own } => {
                let copied =
                    copy_file_range(&*from, Some(&mut from_offset), &*to, Some(&mut to_offset), length)?;
                own.clear_set_id(&*to)?;
                reply.u32(u32::try_from(copied).map_err(|_| Errno::IO)?).u32(0);
            }
        }
        Ok(reply)
    }
}

/// A request that is worked on.
#[derive(Debug)]
pub struct Job {
    /// What the VMM calls it.
    pub unique: u64,
    /// What is to be done.
    pub work: Work,
}

impl Job {
    /// Does it.
    pub fn perform(self) -> Reply {
        Reply::new(self.unique, self.work.perform(), None)
    }
}

#[derive(Debug, Default)]
struct Queues {
    waiting: VecDeque<Job>,
    done: VecDeque<(u64, Reply)>,
    /// Jobs that have been given and not been taken back.
    count: usize,
}

#[derive(Debug)]
struct Common {
    queues: Mutex<Queues>,
    given: Condvar,
    /// What is written here is read at the other end: that something is done.
    done: OwnedFd,
}

/// The thread.
#[derive(Debug)]
pub struct Worker {
    common: Arc<Common>,
    /// A socket and not an eventfd: the server may not read(2), lest it reads what is in files.
    done: OwnedFd,
}

impl Worker {
    /// Starts the thread, which has confined itself when this returns. It ends with the process. Call this before the first thread is
    /// confined, when nothing can be started any more.
    ///
    /// # Errors
    /// When the system is out of threads or descriptors.
    pub fn start() -> io::Result<Self> {
        keep_malloc_from_files();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (done, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let common = Arc::new(Common { queues: Mutex::default(), given: Condvar::new(), done: theirs });
        let (shared, confined) = (Arc::clone(&common), Arc::new(Barrier::new(2)));
        let waits = Arc::clone(&confined);
        thread::Builder::new().name("disks".into()).stack_size(STACK).spawn(move || {
            lock_down().expect("the kernel takes the filter, as it does that of the first thread");
            waits.wait();
            shared.work()
        })?;
        confined.wait();
        Ok(Self { common, done })
    }

    /// Has a job done. Gives it back when there are too many.
    pub fn give(&self, job: Job) -> Option<Job> {
        let mut queues = self.common.queues();
        if queues.count >= JOBS_MAX {
            return Some(job);
        }
        queues.count += 1;
        queues.waiting.push_back(job);
        self.common.given.notify_one();
        None
    }

    /// The `unique` of the next job that is done, and its reply. None as long as nothing is.
    pub fn take(&self) -> Option<(u64, Reply)> {
        let mut queues = self.common.queues();
        let done = queues.done.pop_front();
        match &done {
            Some(_) => queues.count -= 1,
            // What was written so far was about what has been taken.
            None => drop(recv(&self.done, &mut [0; JOBS_MAX][..], RecvFlags::DONTWAIT)),
        }
        done
    }

    /// Readable when something is done.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}

impl Common {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> ! {
        loop {
            let mut queues = self.queues();
            let job = loop {
                match queues.waiting.pop_front() {
                    Some(job) => break job,
                    None => queues = self.given.wait(queues).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(queues);
            let unique = job.unique;
            let reply = job.perform();
            self.queues().done.push_back((unique, reply));
            // If there is no room for more, it is readable.
            let _ = write(&self.done, &[1]);
        }
    }
}
