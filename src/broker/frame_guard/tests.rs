//! Frames that a hostile publisher can cause, against the client's own parser.

use amq_protocol::frame::{AMQPFrame, parse_frame};
use lapin::types::AMQPValue;
use proptest::prelude::*;

use super::*;
use crate::broker::content_header::{BODY_DISCARDED, UNREADABLE};

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[kind], &channel.to_be_bytes()[..], &size, payload, &[0xCE]].concat()
}

fn header(body_size: u64, flags: u16, properties: &[u8]) -> Vec<u8> {
    [&[0, 60, 0, 0][..], &body_size.to_be_bytes(), &flags.to_be_bytes(), properties].concat()
}

fn table(content: &[u8]) -> Vec<u8> {
    [&u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
}

fn entry(name: &[u8], value: &[u8]) -> Vec<u8> {
    [&[u8::try_from(name.len()).unwrap()], name, value].concat()
}

fn nested(depth: usize) -> Vec<u8> {
    (0..depth).fold(b"t\x01".to_vec(), |inner, _| [b"F", &table(&entry(b"n", &inner))[..]].concat())
}

fn passed(guard: &mut FrameGuard, bytes: &[u8]) -> Vec<u8> {
    guard.push(bytes).unwrap();
    let mut out = vec![0; guard.ready.len()];
    let taken = guard.take(&mut out);
    assert_eq!(taken, out.len());
    out
}

fn parsed(bytes: &[u8]) -> AMQPFrame {
    let (rest, frame) = parse_frame(bytes).expect("the client parses the frame");
    assert!(rest.is_empty());
    frame
}

fn repaired(payload: &[u8]) -> lapin::BasicProperties {
    let out = passed(&mut FrameGuard::default(), &frame(HEADER, 1, payload));
    let AMQPFrame::Header(1, header) = parsed(&out) else { panic!("not a header frame") };
    header.properties
}

fn unreadable(properties: &lapin::BasicProperties) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(UNREADABLE)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn headers_nested_1000_deep_are_removed_and_named() {
    let headers = [entry(b"deep", &nested(1000)), entry(b"flat", b"S\x00\x00\x00\x01x")].concat();
    let properties = repaired(&header(2, 1 << 13, &table(&headers)));
    assert_eq!(unreadable(&properties).as_deref(), Some("headers.deep"));
    assert!(properties.headers().as_ref().unwrap().contains_key("flat"));
}

#[test]
fn headers_at_the_depth_limit_pass_unchanged() {
    let properties = repaired(&header(2, 1 << 13, &table(&entry(b"deep", &nested(16)))));
    assert_eq!(unreadable(&properties), None);
    let properties = repaired(&header(2, 1 << 13, &table(&entry(b"deep", &nested(17)))));
    assert_eq!(unreadable(&properties).as_deref(), Some("headers.deep"));
}

#[test]
fn short_strings_that_are_not_utf8_are_removed_and_named() {
    let properties = [b"\x02\xe4x".as_slice(), &table(&entry(b"\xfc", b"V")), b"\x02", b"\x01m"].concat();
    let properties = repaired(&header(2, 1 << 15 | 1 << 13 | 1 << 12 | 1 << 7, &properties));
    assert_eq!(unreadable(&properties).as_deref(), Some("content_type, headers"));
    assert_eq!(properties.delivery_mode(), &Some(2));
    assert_eq!(properties.message_id().as_ref().map(|id| id.as_str()), Some("m"));
}

#[test]
fn unknown_types_and_truncated_properties_are_removed_and_named() {
    let unknown = [entry(b"a", b"V"), entry(b"b", b"z1234"), entry(b"c", b"V")].concat();
    let properties = repaired(&header(2, 1 << 13, &table(&unknown)));
    assert_eq!(unreadable(&properties).as_deref(), Some("headers"));
    assert!(properties.headers().as_ref().unwrap().contains_key("a"));
    assert_eq!(unreadable(&repaired(&header(2, 1 << 15, b"\x09abc"))).as_deref(), Some("content_type"));
    assert_eq!(unreadable(&repaired(&header(2, 1, b"\0\0"))).as_deref(), Some("properties"));
}

#[test]
fn a_publisher_cannot_forge_the_marks() {
    let forged = [entry(UNREADABLE.as_bytes(), b"V"), entry(BODY_DISCARDED.as_bytes(), b"b\x05")].concat();
    assert_eq!(repaired(&header(2, 1 << 13, &table(&forged))), lapin::BasicProperties::default());
}

#[test]
fn headers_above_the_frame_size_are_cut_to_it() {
    let mut guard = FrameGuard::default();
    let tune = frame(METHOD, 0, &[0, 10, 0, 30, 0, 9, 0, 0, 0x10, 0, 0, 60]);
    assert_eq!(passed(&mut guard, &tune), tune, "tune passes unchanged and sets the frame size to 4,096");
    let long = [b"S".as_slice(), &table(&[b'x'; 4080])].concat();
    let headers = [entry(b"long", &long), entry(b"short", b"V")].concat();
    let out = passed(&mut guard, &frame(HEADER, 1, &header(2, 1 << 13, &table(&headers))));
    assert!(out.len() <= 4096, "{}", out.len());
    let AMQPFrame::Header(_, header) = parsed(&out) else { panic!("not a header frame") };
    assert_eq!(unreadable(&header.properties).as_deref(), Some("headers.long"));
    assert!(header.properties.headers().as_ref().unwrap().contains_key("short"));
}

#[test]
fn a_body_far_above_the_limit_is_discarded_and_the_next_message_is_not() {
    let mut guard = FrameGuard::default();
    let size = MAX_BODY_KEPT + 1;
    let out = passed(&mut guard, &frame(HEADER, 1, &header(size, 0, &[])));
    let AMQPFrame::Header(_, seen) = parsed(&out) else { panic!("not a header frame") };
    assert_eq!(seen.body_size, 0);
    let discarded = seen.properties.headers().as_ref().and_then(|headers| headers.inner().get(BODY_DISCARDED));
    assert_eq!(discarded, Some(&AMQPValue::LongLongInt(i64::try_from(size).unwrap())));
    let half = vec![0; usize::try_from(size / 2).unwrap()];
    assert!(passed(&mut guard, &frame(BODY, 1, &half)).is_empty());
    let other = frame(BODY, 2, b"other channel");
    assert_eq!(passed(&mut guard, &other), other);
    assert!(passed(&mut guard, &frame(BODY, 1, &[&half[..], &[0]].concat())).is_empty());
    let next = [frame(HEADER, 1, &header(2, 0, &[])), frame(BODY, 1, b"{}")].concat();
    assert_eq!(passed(&mut guard, &next), next);
}

#[test]
fn routing_keys_and_close_reasons_become_utf8() {
    let arguments = [&[0, 60, 0, 60][..], b"\x01c", &[0; 8], b"\x00", b"\x01e", b"\x03a\xff\xfe"].concat();
    let AMQPFrame::Method(_, _) = parsed(&passed(&mut FrameGuard::default(), &frame(METHOD, 1, &arguments))) else {
        panic!("not a method frame")
    };
    let close = [&[0, 20, 0, 40, 1, 0x94][..], b"\x02\xc3", b"x", &[0; 4]].concat();
    parsed(&passed(&mut FrameGuard::default(), &frame(METHOD, 1, &close)));
}

#[test]
fn the_guard_does_not_depend_on_how_bytes_arrive() {
    let whole = [
        frame(METHOD, 0, &[0, 10, 0, 30, 0, 9, 0, 2, 0, 0, 0, 60]),
        frame(8, 0, &[]),
        frame(HEADER, 3, &header(3, 1 << 15, b"\x01\xff")),
        frame(BODY, 3, b"abc"),
    ]
    .concat();
    let at_once = passed(&mut FrameGuard::default(), &whole);
    let mut guard = FrameGuard::default();
    let one_by_one: Vec<u8> = whole.iter().flat_map(|byte| passed(&mut guard, &[*byte])).collect();
    assert_eq!(at_once, one_by_one);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_content_header_can_be_parsed(
        size in 0..10_u64,
        flags: u16,
        properties in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        repaired(&header(size, flags & !1, &properties));
    }

    #[test]
    fn any_table_of_headers_can_be_parsed(
        entries in prop::collection::vec(
            ("[a-c\u{e4}]{0,3}", prop::sample::select(b"VtbBsUuIifDLldTSxFAz".to_vec()), prop::collection::vec(0..8_u8, 0..24)),
            0..8,
        ),
    ) {
        let content: Vec<u8> = entries
            .iter()
            .flat_map(|(name, kind, value)| entry(name.as_bytes(), &[&[*kind], &value[..]].concat()))
            .collect();
        repaired(&header(2, 1 << 13, &table(&content)));
    }

    #[test]
    fn any_delivery_can_be_parsed(
        tag in prop::collection::vec(any::<u8>(), 0..40),
        exchange in prop::collection::vec(any::<u8>(), 0..40),
        key in prop::collection::vec(any::<u8>(), 0..255),
    ) {
        let text = |bytes: &[u8]| [&[u8::try_from(bytes.len()).unwrap()], bytes].concat();
        let arguments = [&[0, 60, 0, 60][..], &text(&tag), &[0; 9], &text(&exchange), &text(&key)].concat();
        parsed(&passed(&mut FrameGuard::default(), &frame(METHOD, 1, &arguments)));
    }

    #[test]
    fn any_bytes_are_passed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut guard = FrameGuard::default();
        let _ = guard.push(&bytes);
        prop_assert!(guard.ready.len() <= bytes.len() + 1024);
    }
}
