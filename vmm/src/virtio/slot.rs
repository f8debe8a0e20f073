//! The MMIO transport, section 4.2 of the standard, and the plugging of devices into its slots.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER as DRIVER, VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED as FAILED, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{DeviceError, VirtioDevice};
use super::io::{DeviceIo, Interrupt};
use super::registers::SlotRegisters;
use super::watch::HostWatch;
use crate::complaint::complain;
use crate::devices::DeviceState;
use crate::memory::Memory;

/// Register offsets, table 4.1 of the standard.
pub mod regs {
    pub(crate) const MAGIC: usize = 0x00;
    pub(crate) const VERSION: usize = 0x04;
    pub(crate) const DEVICE_ID: usize = 0x08;
    pub(crate) const VENDOR_ID: usize = 0x0c;
    pub(crate) const DEVICE_FEATURES: usize = 0x10;
    pub(crate) const DEVICE_FEATURES_SEL: usize = 0x14;
    pub(crate) const DRIVER_FEATURES: usize = 0x20;
    pub(crate) const DRIVER_FEATURES_SEL: usize = 0x24;
    pub(crate) const QUEUE_SEL: usize = 0x30;
    pub(crate) const QUEUE_SIZE_MAX: usize = 0x34;
    pub(crate) const QUEUE_SIZE: usize = 0x38;
    pub(crate) const QUEUE_READY: usize = 0x44;
    /// A write here is what the ioeventfds listen for.
    pub const QUEUE_NOTIFY: usize = 0x50;
    pub(crate) const INTERRUPT_STATUS: usize = 0x60;
    pub(crate) const INTERRUPT_ACK: usize = 0x64;
    pub(crate) const STATUS: usize = 0x70;
    pub(crate) const QUEUE_DESC: usize = 0x80;
    pub(crate) const QUEUE_DRIVER: usize = 0x90;
    pub(crate) const QUEUE_DEVICE: usize = 0xa0;
    pub(crate) const SHM_LEN: usize = 0xb0;
    pub(crate) const SHM_BASE: usize = 0xb8;
    pub(crate) const CONFIG_GENERATION: usize = 0xfc;
    pub(crate) const CONFIG: usize = 0x100;

    /// InterruptStatus: the device has used buffers.
    pub const INTERRUPT_USED_RING: u32 = 1;
    /// InterruptStatus: the configuration has changed, or the device needs a reset.
    pub const INTERRUPT_CONFIG: u32 = 2;
}

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// Version 2 is what the standard calls non-legacy.
const VERSION: u32 = 2;
/// What an empty slot has instead of a device id: a driver passes it over.
const PLACEHOLDER: u32 = 0;
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Why a slot did not take or give back a device.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// It holds one already.
    #[error("slot {0} is taken")]
    Taken(u8),
    /// It holds none.
    #[error("slot {0} is empty")]
    Empty(u8),
    /// The driver has not let go of it.
    #[error("slot {0} is in use by the guest: unbind its driver first")]
    InUse(u8),
    /// The host is out of descriptors.
    #[error("cannot make an event descriptor for slot {0}")]
    EventFd(u8, #[source] std::io::Error),
    /// Saved state that no device of this kind can have.
    #[error("slot {0}: the saved state of its device is not valid: {1}")]
    State(u8, String),
}

/// One slot: its registers, its interrupt, and the device in it.
#[derive(Debug)]
pub struct Slot {
    number: u8,
    registers: SlotRegisters,
    interrupt: Interrupt,
    memory: Arc<Memory>,
    plugged: Mutex<Option<Plugged>>,
    /// The device's, for a vCPU that finds the device at work.
    kicks: Mutex<Option<Arc<[EventFd]>>>,
}

/// A device in its slot.
pub struct Plugged {
    device: Box<dyn VirtioDevice>,
    queues: Vec<Queue>,
    kicks: Arc<[EventFd]>,
    watch: Option<HostWatch>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

impl std::fmt::Debug for Plugged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "virtio device of type {}, status {:#x}", self.device.device_type(), self.status)
    }
}

/// The transport's part of a saved device, and the device's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    queues: Vec<SavedQueue>,
    device: DeviceState,
}

/// [`QueueState`] in a form that can be written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    size: u16,
    ready: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl Slot {
    /// An empty slot.
    ///
    /// # Errors
    /// [`SlotError::EventFd`] when the host is out of descriptors.
    pub fn new(number: u8, registers: SlotRegisters, memory: Arc<Memory>) -> Result<Self, SlotError> {
        let line = EventFd::new(EFD_NONBLOCK).map_err(|e| SlotError::EventFd(number, e))?;
        let interrupt = Interrupt::new(registers.clone(), line);
        let slot =
            Self { number, registers, interrupt, memory, plugged: Mutex::new(None), kicks: Mutex::new(None) };
        slot.show_placeholder();
        Ok(slot)
    }

    /// The eventfd behind the slot's interrupt line.
    pub fn line(&self) -> &EventFd {
        self.interrupt.line()
    }

    /// Locks the slot. A thread that panicked with the lock has aborted the process, so poison is not an issue.
    pub fn lock(&self) -> MutexGuard<'_, Option<Plugged>> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a device into the slot.
    ///
    /// # Errors
    /// When the slot is taken, or the host is out of descriptors.
    pub fn plug(&self, device: Box<dyn VirtioDevice>) -> Result<(), SlotError> {
        let mut plugged = self.lock();
        if plugged.is_some() {
            return Err(SlotError::Taken(self.number));
        }
        let new = Plugged::new(device).map_err(|e| SlotError::EventFd(self.number, e))?;
        new.show(&self.registers);
        *self.kicks.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&new.kicks));
        *plugged = Some(new);
        Ok(())
    }

    /// Takes the device out of the slot.
    ///
    /// # Errors
    /// When the slot is empty, or a driver holds the device.
    pub fn unplug(&self) -> Result<Plugged, SlotError> {
        let mut plugged = self.lock();
        match plugged.as_ref() {
            None => return Err(SlotError::Empty(self.number)),
            Some(device) if device.status & DRIVER_OK != 0 => return Err(SlotError::InUse(self.number)),
            Some(_) => self.show_placeholder(),
        }
        *self.kicks.lock().unwrap_or_else(PoisonError::into_inner) = None;
        plugged.take().ok_or(SlotError::Empty(self.number))
    }

    /// The guest wrote to the slot's page. Only aligned 32-bit writes to registers and any write to the configuration space
    /// mean something; the rest is ignored, as the standard leaves it to us.
    pub fn write(&self, offset: usize, data: &[u8]) {
        // This write ends every interrupt; it must not wait for a device that is busy with a disk.
        let word = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        if let (regs::INTERRUPT_ACK, Ok(reasons)) = (offset, word) {
            self.interrupt.acknowledge(reasons);
            return;
        }
        if let (regs::QUEUE_NOTIFY, Ok(queue)) = (offset, word) {
            self.notified(queue as usize);
            return;
        }
        let mut guard = self.lock();
        let Some(plugged) = guard.as_mut() else { return };
        if offset >= regs::CONFIG {
            plugged.device.write_config(offset - regs::CONFIG, data);
            plugged.show_config(&self.registers);
        } else if let Ok(word) = word {
            self.write_register(plugged, offset, word);
        }
    }

    fn write_register(&self, plugged: &mut Plugged, offset: usize, word: u32) {
        match offset {
            regs::DEVICE_FEATURES_SEL => plugged.device_features_sel = word,
            regs::DRIVER_FEATURES_SEL => plugged.driver_features_sel = word,
            regs::DRIVER_FEATURES => plugged.set_driver_features(word),
            regs::QUEUE_SEL => plugged.queue_sel = word,
            regs::STATUS if word == 0 => {
                plugged.reset();
                self.registers.set(regs::INTERRUPT_STATUS, 0);
            }
            regs::STATUS => self.set_status(plugged, word),
            _ => plugged.set_queue(offset, word),
        }
        plugged.show(&self.registers);
    }

    /// A vCPU has notified a queue, and no ioeventfd took that. When another thread has the device at work, perhaps with a disk, the vCPU does
    /// not wait for it: the device's own thread comes for the queue then.
    fn notified(&self, queue: usize) {
        let mut guard = match self.plugged.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let kicks = self.kicks.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(kick) = kicks.as_ref().and_then(|kicks| kicks.get(queue)) {
                    let _ = kick.write(1);
                }
                return;
            }
        };
        let Some(plugged) = guard.as_mut() else { return };
        self.work(plugged, |device, io| if io.is_ready(queue) { device.notified(queue, io) } else { Ok(()) });
    }

    /// The status moves on as section 3.1.1 orders, one step after the other, and never back.
    fn set_status(&self, plugged: &mut Plugged, word: u32) {
        if word & plugged.status & !(NEEDS_RESET | FAILED) != plugged.status & !(NEEDS_RESET | FAILED) {
            return;
        }
        let gained = word & !plugged.status;
        if gained & FEATURES_OK != 0 && plugged.features_acceptable() {
            plugged.status |= FEATURES_OK;
        }
        plugged.status |= gained & (ACKNOWLEDGE | DRIVER | FAILED);
        if gained & DRIVER_OK != 0 && plugged.status & FEATURES_OK != 0 {
            if plugged.queues.iter().all(|queue| !queue.ready() || queue.is_valid(&*self.memory)) {
                plugged.status |= DRIVER_OK;
                plugged.start();
            } else {
                self.needs_reset(plugged);
            }
        }
    }

    fn needs_reset(&self, plugged: &mut Plugged) {
        plugged.status |= NEEDS_RESET;
        plugged.show(&self.registers);
        if plugged.status & DRIVER_OK != 0 {
            self.interrupt.raise(regs::INTERRUPT_CONFIG);
        }
    }

    /// The driver has notified a queue.
    pub fn process_queue(&self, queue: usize) {
        let mut guard = self.lock();
        let Some(plugged) = guard.as_mut() else { return };
        if let Some(kick) = plugged.kicks.get(queue) {
            let _ = kick.read();
        }
        self.work(
            plugged,
            |device, io| if io.is_ready(queue) { device.process_queue(queue, io) } else { Ok(()) },
        );
    }

    /// The device's host side is ready.
    pub fn process_host(&self) {
        let mut guard = self.lock();
        let Some(plugged) = guard.as_mut() else { return };
        self.work(plugged, |device, io| device.process_host(io));
    }

    /// The restored machine is about to run: no notification that was on its way is lost.
    pub fn resumed(&self) {
        let mut guard = self.lock();
        let Some(plugged) = guard.as_mut() else { return };
        self.work(plugged, |device, io| device.resumed(io));
        for kick in plugged.kicks.iter() {
            let _ = kick.write(1);
        }
        if plugged.status & DRIVER_OK != 0 {
            self.interrupt.raise(regs::INTERRUPT_USED_RING);
        }
    }

    fn work(
        &self,
        plugged: &mut Plugged,
        work: impl FnOnce(&mut dyn VirtioDevice, &mut DeviceIo<'_>) -> Result<(), DeviceError>,
    ) {
        // Before DRIVER_OK and after an error no queue may be touched; the host's side goes on all the same.
        let live = plugged.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK;
        let queues = if live { &mut plugged.queues[..] } else { &mut [] };
        let mut io = DeviceIo::new(&self.memory, queues, &plugged.kicks, &self.interrupt);
        if let Err(error) = work(plugged.device.as_mut(), &mut io) {
            complain(format_args!("slot {}: {error}; the device needs a reset", self.number));
            self.needs_reset(plugged);
        }
        if let Some(watch) = &mut plugged.watch {
            watch.follow(plugged.device.as_ref());
        }
    }

    fn show_placeholder(&self) {
        self.registers.clear();
        self.registers.set(regs::MAGIC, MAGIC);
        self.registers.set(regs::VERSION, VERSION);
        self.registers.set(regs::DEVICE_ID, PLACEHOLDER);
    }

    /// Keeps the slot as it is until the result is dropped.
    pub fn hold(&self) -> Held<'_> {
        Held { slot: self, plugged: self.lock() }
    }

    /// Gives the slot's device, which has just been plugged, its saved state.
    ///
    /// # Errors
    /// [`SlotError::State`] when the state is not one that such a device can have.
    pub fn restore(&self, state: &SlotState) -> Result<(), SlotError> {
        let invalid = |what: &str| SlotError::State(self.number, what.to_owned());
        let mut guard = self.lock();
        let plugged = guard.as_mut().ok_or(SlotError::Empty(self.number))?;
        if state.queues.len() != plugged.queues.len() {
            return Err(invalid("wrong number of queues"));
        }
        for (queue, saved) in plugged.queues.iter_mut().zip(&state.queues) {
            if saved.max_size != queue.max_size() {
                return Err(invalid("wrong queue size"));
            }
            let restored = Queue::try_from(QueueState::from(saved)).map_err(|e| invalid(&e.to_string()))?;
            if restored.ready() && !restored.is_valid(&*self.memory) {
                return Err(invalid("a queue is not in guest memory"));
            }
            *queue = restored;
        }
        plugged.device.restore(&state.device).map_err(invalid)?;
        plugged.status = state.status;
        plugged.device_features_sel = state.device_features_sel;
        plugged.driver_features_sel = state.driver_features_sel;
        plugged.driver_features = state.driver_features;
        if plugged.status & FEATURES_OK != 0 && !plugged.features_acceptable() {
            return Err(invalid("features that the device does not offer"));
        }
        plugged.queue_sel = state.queue_sel;
        if plugged.status & DRIVER_OK != 0 {
            plugged.start();
        }
        plugged.show(&self.registers);
        self.registers.set(regs::INTERRUPT_STATUS, state.interrupt_status);
        Ok(())
    }
}

/// A slot in which nothing happens.
#[derive(Debug)]
pub struct Held<'a> {
    slot: &'a Slot,
    plugged: MutexGuard<'a, Option<Plugged>>,
}

impl Held<'_> {
    /// The state of the slot's device, if it holds one.
    pub fn save(&self) -> Option<SlotState> {
        let plugged = self.plugged.as_ref()?;
        let interrupt_status = self.slot.registers.word(regs::INTERRUPT_STATUS).load(Ordering::SeqCst);
        Some(SlotState {
            status: plugged.status,
            device_features_sel: plugged.device_features_sel,
            driver_features_sel: plugged.driver_features_sel,
            driver_features: plugged.driver_features,
            queue_sel: plugged.queue_sel,
            interrupt_status: u32::from_le(interrupt_status),
            queues: plugged.queues.iter().map(|queue| SavedQueue::from(queue.state())).collect(),
            device: plugged.device.save(),
        })
    }
}

impl Plugged {
    fn new(device: Box<dyn VirtioDevice>) -> Result<Self, std::io::Error> {
        let queue = |&size: &u16| Queue::new(size).expect("devices have queue sizes that are powers of two");
        let queues: Vec<Queue> = device.queue_sizes().iter().map(queue).collect();
        let kicks = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            queues,
            kicks,
            watch: None,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        })
    }

    /// The eventfds of the queues' notifications.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// What is ready when the device's host side has something to do.
    pub fn host_fd(&self) -> Option<std::os::fd::RawFd> {
        self.device.host_fd()
    }

    /// Those that ioeventfds are to write to: none when the vCPUs do the work.
    pub fn ioeventfds(&self) -> &[EventFd] {
        if self.device.works_on_vcpus() { &[] } else { &self.kicks }
    }

    /// Its type, section 5 of the standard.
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// Has the device's host side, if it has one, watched in `epoll`, which says `data` when it is ready.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn watch_host(&mut self, epoll: &Arc<Epoll>, data: u64) -> Result<(), std::io::Error> {
        self.watch = HostWatch::start(epoll, data, self.device.as_ref())?;
        Ok(())
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn set_driver_features(&mut self, word: u32) {
        // From FEATURES_OK on they are settled (3.1.1).
        if self.status & FEATURES_OK == 0 && self.driver_features_sel < 2 {
            let shift = 32 * self.driver_features_sel;
            self.driver_features &= !(u64::from(u32::MAX) << shift);
            self.driver_features |= u64::from(word) << shift;
        }
    }

    fn set_queue(&mut self, offset: usize, word: u32) {
        // What a queue is, is settled before DRIVER_OK: a queue that moved while in use has been the way out of VMMs.
        if self.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
        match offset {
            regs::QUEUE_SIZE => queue.set_size(u16::try_from(word).unwrap_or(0)),
            regs::QUEUE_READY => queue.set_ready(word == 1),
            regs::QUEUE_DESC => queue.set_desc_table_address(Some(word), None),
            0x84 => queue.set_desc_table_address(None, Some(word)),
            regs::QUEUE_DRIVER => queue.set_avail_ring_address(Some(word), None),
            0x94 => queue.set_avail_ring_address(None, Some(word)),
            regs::QUEUE_DEVICE => queue.set_used_ring_address(Some(word), None),
            0xa4 => queue.set_used_ring_address(None, Some(word)),
            _ => {}
        }
    }

    fn start(&mut self) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
        }
        self.device.activate(self.driver_features);
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        for kick in self.kicks.iter() {
            let _ = kick.read();
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
    }

    /// Stores every register that the guest may read next.
    #[allow(clippy::cast_possible_truncation)] // halves of 64 bits
    fn show(&self, registers: &SlotRegisters) {
        registers.set(regs::MAGIC, MAGIC);
        registers.set(regs::VERSION, VERSION);
        registers.set(regs::VENDOR_ID, 0);
        let features = match self.device_features_sel {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        };
        registers.set(regs::DEVICE_FEATURES, features);
        let queue = self.queues.get(self.queue_sel as usize);
        registers.set(regs::QUEUE_SIZE_MAX, queue.map_or(0, |queue| u32::from(queue.max_size())));
        registers.set(regs::QUEUE_READY, queue.map_or(0, |queue| u32::from(queue.ready())));
        registers.set(regs::STATUS, self.status);
        // No shared memory regions: length and base are -1 (4.2.2.1).
        for word in [regs::SHM_LEN, regs::SHM_LEN + 4, regs::SHM_BASE, regs::SHM_BASE + 4] {
            registers.set(word, u32::MAX);
        }
        self.show_config(registers);
        // Last, since it is what turns a placeholder into a device.
        registers.set(regs::DEVICE_ID, self.device.device_type());
    }

    fn show_config(&self, registers: &SlotRegisters) {
        registers.set_bytes(regs::CONFIG, &self.device.config());
        registers.set(regs::CONFIG_GENERATION, 0);
    }
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl From<&SavedQueue> for QueueState {
    fn from(saved: &SavedQueue) -> Self {
        Self {
            max_size: saved.max_size,
            size: saved.size,
            ready: saved.ready,
            event_idx_enabled: saved.event_idx,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            desc_table: saved.desc_table,
            avail_ring: saved.avail_ring,
            used_ring: saved.used_ring,
        }
    }
}
