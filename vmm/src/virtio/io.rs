//! What a device works with: its queues, guest memory, its interrupt.

use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::device::DeviceError;
use super::registers::SlotRegisters;
use super::slot::regs;
use crate::memory::Memory;

/// A descriptor chain that the driver made available.
pub type Chain<'m> = DescriptorChain<&'m Memory>;

/// What has become of a chain that a device was handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes back to the driver with so many bytes written to it.
    Used(u32),
    /// The device keeps it, and gives it back by [`push`](DeviceIo::push) later.
    Kept,
    /// It stays in the ring and ends the turn. The device comes back for it without being notified.
    Left,
}

/// The interrupt of one slot: a line of the IOAPIC, and the reason in the slot's InterruptStatus register.
#[derive(Debug)]
pub struct Interrupt {
    registers: SlotRegisters,
    line: EventFd,
}

impl Interrupt {
    /// An interrupt that raises `line`.
    pub fn new(registers: SlotRegisters, line: EventFd) -> Self {
        Self { registers, line }
    }

    /// The eventfd that KVM turns into an interrupt.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Interrupts the driver, with bits of InterruptStatus as the reason.
    pub fn raise(&self, reason: u32) {
        self.registers.word(regs::INTERRUPT_STATUS).fetch_or(reason.to_le(), Ordering::SeqCst);
        // An eventfd write fails only when 2^64 - 2 interrupts are pending: then one is pending.
        let _ = self.line.write(1);
    }

    /// The driver has seen these reasons.
    pub fn acknowledge(&self, reasons: u32) {
        self.registers.word(regs::INTERRUPT_STATUS).fetch_and(!reasons.to_le(), Ordering::SeqCst);
    }
}

/// A device's view of the machine while it works.
#[derive(Debug)]
pub struct DeviceIo<'a> {
    memory: &'a Memory,
    queues: &'a mut [Queue],
    kicks: &'a [EventFd],
    interrupt: &'a Interrupt,
}

impl<'a> DeviceIo<'a> {
    /// A view of one device's queues. `kicks` are the eventfds of the queues' notifications.
    pub fn new(
        memory: &'a Memory,
        queues: &'a mut [Queue],
        kicks: &'a [EventFd],
        interrupt: &'a Interrupt,
    ) -> Self {
        Self { memory, queues, kicks, interrupt }
    }

    /// Guest memory.
    pub fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// True when the driver has set this queue up.
    pub fn is_ready(&self, queue: usize) -> bool {
        self.queues.get(queue).is_some_and(QueueT::ready)
    }

    /// The next available chain, if there is one.
    ///
    /// # Errors
    /// When the available ring is malformed.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain<'a>>, DeviceError> {
        Ok(self.queues[queue].iter(self.memory)?.next())
    }

    /// Puts the last popped chain back.
    pub fn unpop(&mut self, queue: usize) {
        self.queues[queue].go_to_previous_position();
    }

    /// Gives a chain back to the driver with `length` bytes written to it. [`notify`](Self::notify) tells the driver.
    ///
    /// # Errors
    /// When the used ring is malformed.
    pub fn push(&mut self, queue: usize, head: u16, length: u32) -> Result<(), DeviceError> {
        Ok(self.queues[queue].add_used(self.memory, head, length)?)
    }

    /// Interrupts the driver if it asked for that, after one or more [`push`](Self::push).
    ///
    /// # Errors
    /// When the rings are malformed.
    pub fn notify(&mut self, queue: usize) -> Result<(), DeviceError> {
        if self.queues[queue].needs_notification(self.memory)? {
            self.interrupt.raise(regs::INTERRUPT_USED_RING);
        }
        Ok(())
    }

    /// Has the device's own thread process a queue.
    ///
    /// # Errors
    /// None: an eventfd takes that many writes.
    pub fn hand_over(&self, queue: usize) -> Result<(), DeviceError> {
        Ok(self.kicks[queue].write(1)?)
    }

    /// Asks the driver to notify the device of the next chain. True when chains are available already.
    ///
    /// # Errors
    /// When the rings are malformed.
    pub fn watch(&mut self, queue: usize) -> Result<bool, DeviceError> {
        Ok(self.queues[queue].enable_notification(self.memory)?)
    }

    /// Hands every available chain to `handle`, which says how many bytes it wrote to it, and gives the chains back. Stops after as many
    /// chains as the queue has entries and comes back for the rest with the next event, so that a driver that adds chains as
    /// fast as they are taken cannot keep the thread.
    ///
    /// # Errors
    /// When the rings are malformed, or what `handle` returned.
    pub fn take_turn(
        &mut self,
        queue: usize,
        mut handle: impl FnMut(&'a Memory, Chain<'a>) -> Result<u32, DeviceError>,
    ) -> Result<(), DeviceError> {
        self.take_turn_with(queue, |memory, chain| handle(memory, chain).map(Fate::Used))
    }

    /// As [`take_turn`](Self::take_turn), for devices that do not give every chain back at once.
    ///
    /// # Errors
    /// As [`take_turn`](Self::take_turn).
    pub fn take_turn_with(
        &mut self,
        queue: usize,
        mut handle: impl FnMut(&'a Memory, Chain<'a>) -> Result<Fate, DeviceError>,
    ) -> Result<(), DeviceError> {
        self.queues[queue].disable_notification(self.memory)?;
        let mut left = self.queues[queue].size();
        loop {
            while let Some(chain) = self.pop(queue)? {
                if left == 0 {
                    self.unpop(queue);
                    self.notify(queue)?;
                    self.kicks[queue].write(1)?;
                    return Ok(());
                }
                left -= 1;
                let head = chain.head_index();
                match handle(self.memory, chain)? {
                    Fate::Used(written) => self.push(queue, head, written)?,
                    Fate::Kept => {}
                    Fate::Left => {
                        self.unpop(queue);
                        return self.notify(queue);
                    }
                }
            }
            if !self.watch(queue)? {
                return self.notify(queue);
            }
        }
    }
}
