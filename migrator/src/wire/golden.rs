//! The bytes of every message of version 1, made by hand from PROTOCOL.md; and that nothing else decodes.

use bytes::Bytes;
use layerfs::chunk::{Class, Codec, StoredChunk};
use layerfs::error::ErrorClass;
use layerfs::{ChunkId, LayerId, LayerName};
use proptest::prelude::*;

use crate::governor::{Pace, Priority, Rate};
use crate::group::Token;
use crate::guest::Obstacle;
use crate::handover::{Fate, MoveId};

use super::codec::round_trip;
use super::{
    Bundle, ChunksWriter, FrameHeader, HEADER_BYTES, Hello, MAX_FRAME_BYTES, MAX_SMALL_FRAME_BYTES, Message, Offer,
    OfferedLayer, Prepare, decode, encode, encode_bundle,
};

fn id(byte: u8) -> ChunkId {
    ChunkId([byte; 32])
}

fn name(text: &str) -> LayerName {
    LayerName::new(text).unwrap()
}

/// Every kind of message, and its frame in hexadecimal.
fn golden() -> Vec<(Message, &'static str)> {
    vec![
        (Message::Hello(Hello::OURS), "13000000014c4657500100010001000000000000000000"),
        (Message::error(ErrorClass::Exists, "taken"), "090000000203050074616b656e"),
        (Message::Alive, "0100000003"),
        (Message::Fetch { names: vec![name("a"), name("b/c")], dry_run: true }, "0c000000100202000100610300622f63"),
        (
            Message::Offer(Offer {
                force: true,
                dry_run: true,
                lazy: true,
                layers: vec![
                    OfferedLayer { id: LayerId(id(1)), file_bytes: 5 },
                    OfferedLayer { id: LayerId(id(2)), file_bytes: 0x0102_0304_0506_0708 },
                ],
                names: vec![(name("app"), 1)],
                hints: vec![LayerId(id(9))],
            }),
            concat!(
                "7f0000001107020001010101010101010101010101010101010101010101010101010101010101010500000000000000",
                "020202020202020202020202020202020202020202020202020202020202020208070605040302010100030061707001",
                "0001000909090909090909090909090909090909090909090909090909090909090909",
            ),
        ),
        (Message::Need { lacking: vec![false, true], held: vec![true] }, "0700000012020002010001"),
        (
            Message::Ask { seq: 7, ids: vec![id(3), id(4)] },
            concat!(
                "470000001307000000020003030303030303030303030303030303030303030303030303030303030303030404040404",
                "040404040404040404040404040404040404040404040404040404",
            ),
        ),
        (Message::Want { seq: 7, wanted: [&[true][..], &[false; 8], &[true]].concat() }, "0900000014070000000a000102"),
        (
            Message::Chunks(vec![
                StoredChunk { id: id(5), class: Class::Data, codec: Codec::Raw, plain_bytes: 3, stored: "abc".into() },
                StoredChunk {
                    id: id(6),
                    class: Class::Manifest,
                    codec: Codec::Zstd,
                    plain_bytes: 262_144,
                    stored: "zz".into(),
                },
            ]),
            concat!(
                "5c0000001502000505050505050505050505050505050505050505050505050505050505050505000003000000030000",
                "006162630606060606060606060606060606060606060606060606060606060606060606030100000400020000007a7a",
            ),
        ),
        (Message::End { chunks: 2 }, "09000000160200000000000000"),
        (
            Message::Get { ids: vec![id(8)] },
            concat!("2300000018", "0100", "0808080808080808080808080808080808080808080808080808080808080808"),
        ),
        (
            Message::Pace(Pace { limit: Some(Rate::new(1_250_000)), priority: Priority::High, paused: true }),
            "0b00000020d0121300000000000201",
        ),
        (Message::Look { names: vec![name("a")], layers: vec![] }, concat!("080000001d", "01000100", "61", "0000")),
        (
            Message::Look { names: vec![], layers: vec![LayerId(id(3))] },
            concat!("250000001d", "0000", "0100", "0303030303030303030303030303030303030303030303030303030303030303"),
        ),
        (
            Message::Trace { layers: vec![LayerId(id(3))] },
            concat!("230000001e", "0100", "0303030303030303030303030303030303030303030303030303030303030303"),
        ),
        (
            Message::Traced { layer: LayerId(id(3)), ids: vec![id(4)] },
            concat!(
                "430000001f",
                "0303030303030303030303030303030303030303030303030303030303030303",
                "0100",
                "0404040404040404040404040404040404040404040404040404040404040404"
            ),
        ),
        (Message::Done { changed: 1 }, "03000000170100"),
        (
            Message::Bundle(Bundle {
                bases: vec![[1; 8], [2; 8]],
                pages: vec![],
                first: Some(0x0102),
                chunks: 2,
                plain_bytes: 65_840,
                frame: "zzz".into(),
            }),
            concat!(
                "2400000019",
                "0200",
                "0101010101010101",
                "0202020202020202",
                "02010000",
                "0200",
                "30010100",
                "03000000",
                "7a7a7a",
            ),
        ),
        (
            Message::Bundle(Bundle {
                bases: vec![],
                pages: vec![],
                first: None,
                chunks: 1,
                plain_bytes: 9,
                frame: "z".into(),
            }),
            concat!("1200000019", "0000", "ffffffff", "0100", "09000000", "01000000", "7a"),
        ),
        (
            Message::Bundle(Bundle {
                bases: vec![[1; 8], [2; 8]],
                pages: vec![0x8001, 2],
                first: Some(5),
                chunks: 2,
                plain_bytes: 12_288,
                frame: "zzz".into(),
            }),
            concat!(
                "260000003c",
                "0200",
                "0101010101010101",
                "0202020202020202",
                "01800200",
                "05000000",
                "00300000",
                "03000000",
                "7a7a7a",
            ),
        ),
        (Message::Group { token: Token([10; 16]) }, "110000001a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a"),
        (Message::Join { token: Token([11; 16]) }, "110000001b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b"),
        (Message::Part { number: 4 }, "09000000210400000000000000"),
        (Message::Got { frames: 3 }, "090000001c0300000000000000"),
        (
            Message::Prepare(Box::new(Prepare {
                id: MoveId([12; 16]),
                epoch: 3,
                dry_run: true,
                gives_back: true,
                post_copy: true,
                stack: LayerId(id(1)),
                spec: "{}".to_owned(),
                surroundings: "{ }".to_owned(),
            })),
            concat!(
                "4300000030",
                "0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c",
                "0300000000000000",
                "0e",
                "0101010101010101010101010101010101010101010101010101010101010101",
                "02007b7d",
                "03007b207d",
            ),
        ),
        (Message::prepared(vec![Obstacle::new("a", "bc")]), "0a00000031010001006102006263"),
        (
            Message::Stage { id: MoveId([12; 16]), instance: LayerId(id(1)), state: LayerId(id(2)), lazily: true },
            concat!(
                "5200000032",
                "0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c",
                "0101010101010101010101010101010101010101010101010101010101010101",
                "0202020202020202020202020202020202020202020202020202020202020202",
                "04",
            ),
        ),
        (Message::Commit { id: MoveId([12; 16]) }, "11000000330c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c"),
        (Message::Abort { id: MoveId([12; 16]) }, "11000000340c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c"),
        (Message::Inquire { id: MoveId([12; 16]) }, "11000000350c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c"),
        (Message::fate(Fate::Restored, 258, "ok"), "0e0000003604020100000000000002006f6b"),
    ]
}

/// The frames of all of them.
pub(crate) fn golden_frames() -> Vec<Vec<u8>> {
    let frame = |(message, _)| {
        let mut frame = Vec::new();
        encode(&message, &mut frame);
        frame
    };
    golden().into_iter().map(frame).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_message_has_its_bytes() {
    for (message, expected) in golden() {
        let mut frame = Vec::new();
        encode(&message, &mut frame);
        assert_eq!(hex(&frame), expected, "{}", message.kind());
        assert_eq!(round_trip(&message), message);
    }
}

#[test]
fn whatever_carries_chunks_is_bulk_by_its_header_too() {
    let mut kinds = std::collections::BTreeSet::new();
    for (message, _) in golden() {
        let mut frame = Vec::new();
        encode(&message, &mut frame);
        let header = FrameHeader::decode(frame.first_chunk().unwrap()).unwrap();
        assert_eq!(header.is_bulk(), message.is_bulk(), "{message:?}");
        kinds.extend(header.is_bulk().then_some(header.kind));
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), [0x15, 0x19, 0x3c]);
}

#[test]
fn chunks_are_framed_alike_by_both_writers() {
    for (message, expected) in golden() {
        if let Message::Chunks(chunks) = message {
            let mut writer = ChunksWriter::default();
            chunks.iter().for_each(|chunk| writer.push(chunk));
            assert_eq!(hex(&writer.finish()), expected);
        } else if let Message::Bundle(bundle) = message {
            assert_eq!(hex(&encode_bundle(&bundle)), expected);
        }
    }
}

#[test]
fn no_truncated_or_longer_body_decodes() {
    for (message, _) in golden() {
        let mut frame = Vec::new();
        encode(&message, &mut frame);
        let body = Bytes::copy_from_slice(&frame[HEADER_BYTES..]);
        for cut in 0..body.len() {
            assert!(decode(frame[4], &body.slice(..cut)).is_err(), "{} cut at {cut}", message.kind());
        }
        let longer = Bytes::from([&body[..], &[0]].concat());
        assert!(decode(frame[4], &longer).is_err(), "{}", message.kind());
    }
}

#[test]
fn lengths_are_checked_before_anything_is_allocated() {
    let header = |bytes: usize, kind: u8| {
        let [a, b, c, d] = (bytes as u32).to_le_bytes();
        FrameHeader::decode(&[a, b, c, d, kind])
    };
    assert!(header(0, 3).is_err());
    assert!(header(MAX_SMALL_FRAME_BYTES, 0x13).is_ok() && header(MAX_SMALL_FRAME_BYTES + 1, 0x13).is_err());
    assert!(header(MAX_FRAME_BYTES, 0x15).is_ok() && header(MAX_FRAME_BYTES + 1, 0x15).is_err());
    assert!(header(u32::MAX as usize, 0x15).is_err());
}

#[test]
fn a_later_hello_is_understood_as_far_as_it_must_be() {
    let mut frame = Vec::new();
    encode(&Message::Hello(Hello { version: 2, lowest: 2, highest: 9, features: 0 }), &mut frame);
    frame.extend_from_slice(b"more");
    let body = Bytes::copy_from_slice(&frame[HEADER_BYTES..]);
    assert!(matches!(decode(1, &body), Ok(Message::Hello(Hello { highest: 9, .. }))));
}

#[test]
fn an_error_of_any_length_fits_and_shows_no_control_characters() {
    let long = round_trip(&Message::error(ErrorClass::Io, "\u{e9}\u{1b}[31m".repeat(2000)));
    let Message::Error { text, .. } = long else { panic!("an error") };
    assert!(text.len() <= super::MAX_ERROR_TEXT && !text.contains('\u{1b}'));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nothing_panics_and_what_decodes_encodes_alike(kind in 0u8..0x38, body in prop::collection::vec(any::<u8>(), 0..200)) {
        check_decoding(kind, body)?;
    }

    #[test]
    fn damaged_messages_are_refused_or_mean_what_they_say(
        which in 0usize..golden().len(), flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
    ) {
        let (message, _) = golden().swap_remove(which);
        let mut frame = Vec::new();
        encode(&message, &mut frame);
        let mut body = frame.split_off(HEADER_BYTES);
        if !body.is_empty() {
            flips.iter().for_each(|(at, bit)| { let at = at.index(body.len()); body[at] ^= 1 << bit; });
        }
        check_decoding(frame[4], body)?;
    }
}

fn check_decoding(kind: u8, body: Vec<u8>) -> Result<(), TestCaseError> {
    let body = Bytes::from(body);
    // An error's text is cleaned, and a later Hello may be longer.
    if let Ok(message) = decode(kind, &body)
        && !matches!(message, Message::Error { .. } | Message::Hello(_))
    {
        let mut frame = Vec::new();
        encode(&message, &mut frame);
        prop_assert_eq!(&frame[HEADER_BYTES..], &body[..]);
    }
    Ok(())
}
