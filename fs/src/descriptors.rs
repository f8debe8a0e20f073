//! The descriptors of nodes: a cache of bounded size. The oldest that has not been used since the last time round makes room.

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Where a descriptor is in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

#[derive(Debug)]
struct Kept {
    node: u64,
    descriptor: Arc<OwnedFd>,
    used: bool,
    pinned: bool,
}

/// Descriptors of nodes.
#[derive(Debug)]
pub struct Descriptors {
    slots: Vec<Option<Kept>>,
    free: Vec<usize>,
    /// What is looked at next when room is needed.
    hand: usize,
    max: usize,
    pinned: usize,
}

impl Descriptors {
    /// A cache of at most `max` descriptors, at least one.
    pub fn new(max: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), hand: 0, max: max.max(1), pinned: 0 }
    }

    /// A descriptor that is there.
    pub fn get(&mut self, slot: Slot) -> Option<Arc<OwnedFd>> {
        let kept = self.slots.get_mut(slot.0)?.as_mut()?;
        kept.used = true;
        Some(Arc::clone(&kept.descriptor))
    }

    /// Keeps a descriptor. The second result is the node whose descriptor had to go.
    pub fn insert(&mut self, node: u64, descriptor: Arc<OwnedFd>) -> (Slot, Option<u64>) {
        let kept = Some(Kept { node, descriptor, used: true, pinned: false });
        if let Some(free) = self.free.pop() {
            self.slots[free] = kept;
            return (Slot(free), None);
        }
        if self.slots.len() < self.max {
            self.slots.push(kept);
            return (Slot(self.slots.len() - 1), None);
        }
        let slot = self.oldest();
        let gone = self.take(slot);
        self.slots[slot.0] = kept;
        (slot, gone.map(|gone| gone.node))
    }

    /// Makes a descriptor stay, since the node could not be opened again. Half of the cache may stay; beyond that nothing is promised.
    pub fn pin(&mut self, slot: Slot) {
        let room = self.pinned < self.max / 2;
        if let Some(Some(kept)) = self.slots.get_mut(slot.0)
            && room
            && !kept.pinned
        {
            kept.pinned = true;
            self.pinned += 1;
        }
    }

    /// Lets it go like any other.
    pub fn unpin(&mut self, slot: Slot) {
        if let Some(Some(kept)) = self.slots.get_mut(slot.0)
            && kept.pinned
        {
            kept.pinned = false;
            self.pinned -= 1;
        }
    }

    /// Closes a descriptor.
    pub fn remove(&mut self, slot: Slot) {
        if self.take(slot).is_some() {
            self.free.push(slot.0);
        }
    }

    fn take(&mut self, slot: Slot) -> Option<Kept> {
        let kept = self.slots.get_mut(slot.0)?.take()?;
        self.pinned -= usize::from(kept.pinned);
        Some(kept)
    }

    /// Two rounds find one, since at most half are pinned and the first round takes the mark of use from the others.
    fn oldest(&mut self) -> Slot {
        for _ in 0..2 * self.slots.len() {
            let at = self.hand;
            self.hand = (at + 1) % self.slots.len();
            if let Some(kept) = &mut self.slots[at]
                && !kept.pinned
                && !std::mem::take(&mut kept.used)
            {
                return Slot(at);
            }
        }
        Slot(self.hand)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    #[test]
    fn what_was_used_lately_stays_longer() {
        let mut cache = Descriptors::new(4);
        let slots: Vec<_> = (0..4).map(|node| cache.insert(node, descriptor()).0).collect();
        assert_eq!(cache.insert(4, descriptor()).1, Some(0), "all were used, so the order decides");
        assert!(cache.get(slots[1]).is_some());
        assert_eq!(cache.insert(5, descriptor()).1, Some(2));
    }

    #[test]
    fn pinned_descriptors_stay_but_never_more_than_half() {
        let mut cache = Descriptors::new(4);
        for node in 0..4 {
            let (slot, _) = cache.insert(node, descriptor());
            cache.pin(slot);
        }
        for node in 4..20 {
            let gone = cache.insert(node, descriptor()).1.unwrap();
            assert!(gone > 1, "{gone} was pinned");
        }
        let slot = Slot(0);
        cache.unpin(slot);
        cache.unpin(slot);
        let gone: Vec<_> = (20..24).filter_map(|node| cache.insert(node, descriptor()).1).collect();
        assert!(gone.contains(&0) && !gone.contains(&1), "{gone:?}");
    }

    #[test]
    fn a_removed_one_makes_room() {
        let mut cache = Descriptors::new(2);
        let (slot, _) = cache.insert(1, descriptor());
        cache.insert(2, descriptor());
        cache.pin(slot);
        cache.remove(slot);
        cache.remove(slot);
        assert!(cache.get(slot).is_none());
        assert_eq!(cache.insert(3, descriptor()), (slot, None));
        assert_eq!(cache.pinned, 0);
    }
}
