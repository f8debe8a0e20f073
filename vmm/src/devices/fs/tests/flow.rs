//! A server that does not keep up.

use super::super::pending::PENDING_MAX;
use super::*;

/// A body that fills the socket in few requests.
const LARGE: usize = 32 << 10;

/// Puts requests into a ring until the device leaves one there. Returns how many it has taken.
fn stuff(world: &mut World, queue: usize, bytes: &[u8], room: &[u32]) -> u16 {
    for head in 0..QUEUE_SIZES[queue] {
        world.put(queue, head, bytes, &[40], room);
        world.process(queue).unwrap();
        if world.queues[queue].next_avail() != world.rings[queue].available {
            return head;
        }
    }
    panic!("the socket does not fill");
}

#[test]
fn requests_that_do_not_fit_into_the_socket_wait_in_the_ring() {
    let mut world = World::new();
    let count = stuff(&mut world, REQUESTS, &request(op::GETATTR, 8, &vec![0; LARGE]), &[16, 104]);
    assert!(count > 0);
    world.settle();
    assert_eq!(world.queues[REQUESTS].next_avail(), count, "it waits and does not spin");
    let mut answered = 0;
    while let Some(asked) = world.asked() {
        world.reply(&reply(asked.tag(), 0, &[1; 104]), &[]);
        answered += world.used(REQUESTS).len();
    }
    assert_eq!(answered, usize::from(count) + 1);
}

#[test]
fn forgets_that_nobody_replies_to_go_on_when_the_socket_has_room() {
    let mut world = World::new();
    let forget = request(op::BATCH_FORGET, 8, &vec![0; LARGE]);
    let count = stuff(&mut world, HIPRIO, &forget, &[]);
    assert!(world.device.pending.is_empty(), "nothing will ever come from the server");
    assert_eq!(world.used(HIPRIO).len(), usize::from(count));
    // More of them, on the other queue too, of which the device must not lose sight.
    world.put(REQUESTS, 0, &forget, &[], &[]);
    world.process(REQUESTS).unwrap();
    world.settle();
    let mut received = 0;
    while world.asked().is_some() {
        received += 1;
        world.settle();
    }
    assert_eq!(received, usize::from(count) + 2);
    assert_eq!((world.used(HIPRIO).len(), world.used(REQUESTS).len()), (1, 1));
    assert_eq!(world.device.host_events(), vmm_sys_util::epoll::EventSet::IN);
}

#[test]
fn a_small_request_that_still_fits_does_not_hide_one_that_waits() {
    let mut world = World::new();
    stuff(&mut world, HIPRIO, &request(op::BATCH_FORGET, 8, &vec![0; LARGE]), &[]);
    // The server reads one packet: now there is room, but not so much that the socket says so.
    world.asked().unwrap();
    world.put(REQUESTS, 0, &request(op::BATCH_FORGET, 8, &vec![0; LARGE]), &[], &[]);
    world.process(REQUESTS).unwrap();
    world.settle();
    while world.asked().is_some() {
        world.settle();
    }
    for queue in [HIPRIO, REQUESTS] {
        assert_eq!(world.queues[queue].next_avail(), world.rings[queue].available);
    }
}

#[test]
fn more_requests_than_the_table_holds_wait_for_replies() {
    let mut world = World::new();
    let bytes = request(op::GETATTR, 8, &[]);
    let mut asked = Vec::new();
    for head in 0..QUEUE_SIZES[REQUESTS] {
        world.put(REQUESTS, head, &bytes, &[], &[16]);
        world.process(REQUESTS).unwrap();
        asked.extend(world.asked());
    }
    assert_eq!(asked.len(), PENDING_MAX);
    assert!(!world.host_ready(), "the socket has room, which is of no use");
    let mut answered = 0;
    while let Some(next) = asked.pop() {
        world.reply(&reply(next.tag(), 0, &[]), &[]);
        answered += world.used(REQUESTS).len();
        asked.extend(std::iter::from_fn(|| world.asked()));
    }
    assert_eq!(answered, usize::from(QUEUE_SIZES[REQUESTS]));
    assert!(world.device.pending.is_empty());
}

#[test]
fn a_reset_that_finds_the_socket_full_is_told_before_anything_else() {
    let mut world = World::new();
    let count = stuff(&mut world, HIPRIO, &request(op::BATCH_FORGET, 8, &vec![0; LARGE]), &[]);
    world.device.reset();
    world.follow();
    world.rings = [Ring::new(HIPRIO), Ring::new(REQUESTS)];
    world.memory.write_slice(&vec![0; 0x3_0000], GuestAddress(0x1_0000)).unwrap();
    world.queues = world.rings.iter().map(Ring::queue).collect();
    world.ask(0, op::GETATTR, &[0; 16], 104);
    world.settle();
    let mut opcodes = Vec::new();
    while let Some(asked) = world.asked() {
        opcodes.push(asked.opcode());
        world.settle();
    }
    assert_eq!(opcodes[usize::from(count)..], [op::DESTROY, op::GETATTR]);
}

#[test]
fn a_server_that_ends_while_the_socket_is_full_leaves_nothing_in_the_rings() {
    let mut world = World::new();
    let count = stuff(&mut world, REQUESTS, &request(op::GETATTR, 8, &vec![0; LARGE]), &[16, 104]);
    world.end_server();
    world.settle();
    let used = world.used(REQUESTS);
    assert_eq!(used.len(), usize::from(count) + 1);
    assert!(used.iter().all(|used| used.error() == -libc::EIO));
}
