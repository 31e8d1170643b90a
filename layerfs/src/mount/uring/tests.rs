//! Tests of the decoder, and of what is kept of a request. Real mounts are tested with both transports beside.

#![allow(clippy::print_stderr)] // a test that can't run says so

use std::sync::Arc;

use proptest::prelude::*;

use super::memory::{Left, Parts};
use super::*;
use crate::mount::abi::{Answer, Operation};
use crate::mount::requests;
use crate::mount::tests::{empty_fs, store};

/// What the kernel would write into a slot: header, the operation's structure, and what follows.
fn put(memory: &Memory, slot: usize, number: u64, header: &[u8], fields: &[u8], payload: &[u8]) {
    let start = 4096 + slot as u64 * (4096 + PAYLOAD_BYTES as u64);
    let parts = [
        (4096, payload),
        (128, fields),
        (264, &number.to_ne_bytes()[..]),
        (272, &(payload.len() as u32).to_ne_bytes()[..]),
        (0, header),
    ];
    for (offset, bytes) in parts {
        assert_eq!(rustix::io::pwrite(memory, bytes, start + offset).unwrap(), bytes.len());
    }
}

fn header(code: u32, number: u64, ino: u64) -> [u8; 40] {
    let mut header = [0; 40];
    header[4..8].copy_from_slice(&code.to_ne_bytes());
    header[8..16].copy_from_slice(&number.to_ne_bytes());
    header[16..24].copy_from_slice(&ino.to_ne_bytes());
    header
}

fn memory() -> Option<Memory> {
    Memory::new(4).inspect_err(|error| eprintln!("SKIPPED: {error}")).ok()
}

fn slots(memory: &Memory) -> Vec<Slot<'_>> {
    memory.slots().map(|(_, slot)| slot).collect()
}

#[test]
fn the_next_daemon_finds_what_the_last_one_left() {
    let Some(memory) = memory() else { return };
    let name = b"a name\0";
    let data = vec![7; 9000];
    put(&memory, 1, 100, &header(1, 100, 1), &[], name);
    put(&memory, 2, 102, &header(16, 102, 5), &[1; 40], &data);
    put(&memory, 3, 104, &header(1, 104, 1), &[], name);
    {
        let mut slots = slots(&memory);
        assert_eq!(slots[0].left(), Left::Nothing);
        for slot in &mut slots[1..4] {
            assert_eq!(slot.left(), Left::Request);
            slot.keep();
            let mut spare = [0; KEPT_PAYLOAD_BYTES];
            // An answer that isn't finished.
            slot.parts(&mut spare).room[..500].fill(0xee);
        }
        slots[2].finish(&answer_header(102, 0, 8), 8, Some(&[9; 8]));
        put(&memory, 2, 106, &header(16, 106, 5), &[1; 40], &data);
        slots[2].keep();
        slots[3].finish(&answer_header(104, 2, 0), 0, None);
    }
    let file = memory.as_fd().try_clone_to_owned().unwrap();
    let slot_count = memory.slots().count();
    drop(memory);
    // Overwritten in part by an answer when the daemon died.
    let start = 4096 + 2 * (4096 + PAYLOAD_BYTES as u64);
    rustix::io::pwrite(&file, &[9; 8], start + 4096).unwrap();
    let memory = Memory::left(&file).unwrap();
    assert!(memory.was_left());
    assert_eq!(memory.slots().count(), slot_count);
    let mut slots = slots(&memory);
    let left: Vec<_> = slots[..4].iter().map(Slot::left).collect();
    assert_eq!(left, [Left::Nothing, Left::Request, Left::Request, Left::Answer]);
    let mut spare = [0; KEPT_PAYLOAD_BYTES];
    for (slot, number, payload) in [(1, 100, &name[..]), (2, 106, &data[..])] {
        slots[slot].keep();
        let Parts { header, operation, payload: kept, .. } = slots[slot].parts(&mut spare);
        let request = Request::of_parts(header, operation, kept).unwrap();
        assert_eq!((request.asked.number, request.rest()), (number, payload));
    }
}

#[test]
fn other_files_are_no_memory() {
    let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert!(Memory::left(&file).is_err());
    rustix::io::write(&file, &[0xff; 5000]).unwrap();
    assert!(Memory::left(&file).is_err());
}

#[test]
fn processors_without_gaps_are_counted() {
    assert_eq!(["0", "0-3", "0-127"].map(count_of), [Some(1), Some(4), Some(128)]);
    assert_eq!(["", "1", "1-3", "0-3,5", "0,2-3", "0-18446744073709551615"].map(count_of), [None; 6]);
}

/// A front over an empty filesystem that can be written to.
fn front() -> Front {
    let (fs, store_folder) = (Arc::new(empty_fs(store())), store().folder().to_owned());
    Front { fs, kernel: Default::default(), store_folder, owner: None }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever bytes come, each request has an answer, and it fits.
    #[test]
    fn no_request_is_too_odd(
        code in 0u32..60,
        ino in prop_oneof![Just(1u64), 0u64..4, any::<u64>()],
        fields in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 128),
        rest in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..64),
        room in 0usize..600,
    ) {
        thread_local! {
            static FRONT: Front = front();
        }
        let header = header(code, 7, ino);
        let request = Request::of_parts(&header, &fields, &rest).unwrap();
        // A copy of so many bytes as random ones say would take long.
        prop_assume!(request.operation != Operation::CopyFileRange);
        let mut room = vec![0; room];
        let (errno, bytes) = FRONT.with(|front| {
            let mut answer = Answer::new(&mut room);
            match requests::answer(front, &request, &mut answer) {
                Ok(()) => (0, answer.bytes()),
                Err(errno) => (errno.0, 0),
            }
        });
        prop_assert!((0..512).contains(&errno) && bytes <= room.len());
    }

    /// A request in one piece is what its length says, or none.
    #[test]
    fn whole_requests_are_checked(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0u32..220, code in 0u32..60) {
        let mut bytes = bytes;
        for (at, value) in [(0, length), (4, code)] {
            if let Some(room) = bytes.get_mut(at..at + 4) {
                room.copy_from_slice(&value.to_ne_bytes());
            }
        }
        if let Ok(request) = Request::whole(&bytes) {
            prop_assert!(length as usize <= bytes.len() && length >= 40);
            let _ = (request.name(), request.names());
            FORGETS.with(|front| requests::forget(front, &request));
        }
    }
}

thread_local! {
    static FORGETS: Front = front();
}
