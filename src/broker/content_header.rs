//! Repair of content headers that the AMQP client cannot parse.
//!
//! RabbitMQ passes on whatever a publisher wrote: short strings in any encoding, tables nested to any depth, headers up
//! to the frame size. The client fails the whole connection on the first two and overflows its stack on a deep table. A
//! repaired header lacks the offending properties and names them in [`UNREADABLE`].

/// Header that names the properties removed by the repair. Written by the repair alone: a publisher's own is removed.
pub(super) const UNREADABLE: &str = "x-inventoryd-unreadable";
/// Header with the size of a body that was discarded. Written by the repair alone.
pub(super) const BODY_DISCARDED: &str = "x-inventoryd-body-discarded";
/// Deepest table or array that is passed on; RabbitMQ's own headers nest to three levels.
const MAX_DEPTH: usize = 16;
/// Space for the two headers written by the repair.
const MARKS_BYTES: usize = 512;
const MAX_NAMED_BYTES: usize = 256;
const FIXED_BYTES: usize = 12;
const BODY_SIZE: std::ops::Range<usize> = 4..12;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    ShortString,
    Table,
    Bytes(usize),
}

/// Properties in the order of their flags, from the highest bit down.
const PROPERTIES: [(&str, Kind); 14] = [
    ("content_type", Kind::ShortString),
    ("content_encoding", Kind::ShortString),
    ("headers", Kind::Table),
    ("delivery_mode", Kind::Bytes(1)),
    ("priority", Kind::Bytes(1)),
    ("correlation_id", Kind::ShortString),
    ("reply_to", Kind::ShortString),
    ("expiration", Kind::ShortString),
    ("message_id", Kind::ShortString),
    ("timestamp", Kind::Bytes(8)),
    ("type", Kind::ShortString),
    ("user_id", Kind::ShortString),
    ("app_id", Kind::ShortString),
    ("cluster_id", Kind::ShortString),
];

/// Size of the body that a content header announces.
pub(super) fn body_size(payload: &[u8]) -> u64 {
    payload.get(BODY_SIZE).and_then(|size| size.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// Rebuilds the payload of a content-header frame with everything that the client can parse, in at most `capacity` bytes.
/// With `discard_body` the header announces an empty body.
pub(super) fn repair(payload: &[u8], capacity: usize, discard_body: bool) -> Vec<u8> {
    let mut found = Found::read(payload);
    found.fit(capacity);
    found.write(payload, discard_body)
}

/// Parts of a content header that the client can parse.
#[derive(Default)]
struct Found<'a> {
    /// Encoded values, by the index of their property; `headers` stays empty here.
    values: [Option<&'a [u8]>; PROPERTIES.len()],
    /// Encoded entries of the headers table, with their names.
    headers: Vec<(&'a str, &'a [u8])>,
    unreadable: Vec<String>,
}

impl<'a> Found<'a> {
    fn read(payload: &'a [u8]) -> Self {
        let mut found = Self::default();
        let mut input = Input(payload.get(FIXED_BYTES..).unwrap_or_default());
        let Some(flags) = input.u16() else { return found };
        if flags & 1 != 0 {
            // A continuation flag: no property of AMQP 0-9-1 needs a second flag word.
            found.unreadable.push("properties".to_owned());
            return found;
        }
        for (index, (name, kind)) in PROPERTIES.into_iter().enumerate() {
            if flags & (1 << (15 - index)) == 0 {
                continue;
            }
            let before = input;
            let readable = match kind {
                Kind::Bytes(count) => input.take(count).map(|_| true),
                Kind::ShortString => input.short_string().map(|text| std::str::from_utf8(text).is_ok()),
                Kind::Table => input.long_bytes().map(|table| {
                    found.read_headers(table);
                    false
                }),
            };
            match readable {
                Some(true) => found.values[index] = Some(before.up_to(input)),
                Some(false) if kind == Kind::Table => {}
                Some(false) => found.unreadable.push(name.to_owned()),
                None => {
                    // Truncated: the position of everything that follows is unknown.
                    found.unreadable.push(name.to_owned());
                    break;
                }
            }
        }
        found
    }

    fn read_headers(&mut self, table: &'a [u8]) {
        let mut input = Input(table);
        while !input.0.is_empty() {
            let before = input;
            let Some((name, readable)) = input.entry(MAX_DEPTH) else {
                self.unreadable.push("headers".to_owned());
                return;
            };
            match std::str::from_utf8(name) {
                Ok(UNREADABLE | BODY_DISCARDED) => {}
                Ok(name) if readable => self.headers.push((name, before.up_to(input))),
                Ok(name) => self.unreadable.push(header_name(name)),
                Err(_) => self.unreadable.push("headers".to_owned()),
            }
        }
    }

    /// Removes the largest headers until the rest fits: RabbitMQ sends a header frame above the negotiated size when
    /// its own headers (`x-death`, `x-delivery-count`) were added to a publisher's that just fitted.
    fn fit(&mut self, capacity: usize) {
        let values: usize = self.values.iter().flatten().map(|value| value.len()).sum();
        let mut size = FIXED_BYTES + 6 + values;
        size += self.headers.iter().map(|(_, entry)| entry.len()).sum::<usize>();
        if size <= capacity && self.unreadable.is_empty() {
            return;
        }
        size += MARKS_BYTES;
        while size > capacity {
            let largest = self.headers.iter().enumerate().max_by_key(|(_, (_, entry))| entry.len());
            let Some(index) = largest.map(|(index, _)| index) else { return };
            let (name, entry) = self.headers.remove(index);
            size -= entry.len();
            self.unreadable.push(header_name(name));
        }
    }

    fn write(&self, payload: &[u8], discard_body: bool) -> Vec<u8> {
        let mut out = payload.get(..FIXED_BYTES).unwrap_or(payload).to_vec();
        if discard_body {
            out[BODY_SIZE].fill(0);
        }
        let table = self.headers_table(discard_body.then(|| body_size(payload)));
        let mut flags = 0_u16;
        for (index, (_, kind)) in PROPERTIES.iter().enumerate() {
            let there = if *kind == Kind::Table { !table.is_empty() } else { self.values[index].is_some() };
            flags |= u16::from(there) << (15 - index);
        }
        out.extend(flags.to_be_bytes());
        for (value, (_, kind)) in self.values.iter().zip(PROPERTIES) {
            if kind == Kind::Table && !table.is_empty() {
                out.extend(length(table.len()));
                out.extend(&table);
            }
            out.extend(value.unwrap_or_default());
        }
        out
    }

    fn headers_table(&self, discarded: Option<u64>) -> Vec<u8> {
        let mut table: Vec<u8> = self.headers.iter().flat_map(|(_, entry)| *entry).copied().collect();
        let mut mark = |name: &str, kind: u8, value: &[u8]| {
            table.push(u8::try_from(name.len()).unwrap_or_default());
            table.extend(name.bytes().chain([kind]).chain(value.iter().copied()));
        };
        if !self.unreadable.is_empty() {
            let mut names = self.unreadable.clone();
            names.dedup();
            let text = names.join(", ");
            let text = &text[..text.floor_char_boundary(MAX_NAMED_BYTES)];
            mark(UNREADABLE, b'S', &[&length(text.len()), text.as_bytes()].concat());
        }
        if let Some(size) = discarded {
            mark(BODY_DISCARDED, b'l', &i64::try_from(size).unwrap_or(i64::MAX).to_be_bytes());
        }
        table
    }
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

fn header_name(name: &str) -> String {
    let plain = name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_graphic());
    if plain { format!("headers.{name}") } else { "headers".to_owned() }
}

/// True if the client can parse this table: every name UTF-8, every type known, no level below [`MAX_DEPTH`].
pub(super) fn is_readable_table(content: &[u8]) -> bool {
    readable_table(content, MAX_DEPTH)
}

fn readable_table(content: &[u8], depth: usize) -> bool {
    let mut input = Input(content);
    while !input.0.is_empty() {
        match input.entry(depth) {
            Some((name, true)) if std::str::from_utf8(name).is_ok() => {}
            _ => return false,
        }
    }
    true
}

fn readable_array(content: &[u8], depth: usize) -> bool {
    let mut input = Input(content);
    while !input.0.is_empty() {
        if input.value(depth) != Some(true) {
            return false;
        }
    }
    true
}

/// Bytes not read yet.
#[derive(Clone, Copy)]
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    fn short_string(&mut self) -> Option<&'a [u8]> {
        let length = *self.take(1)?.first()?;
        self.take(usize::from(length))
    }

    fn long_bytes(&mut self) -> Option<&'a [u8]> {
        let length = u32::from_be_bytes(self.take(4)?.try_into().ok()?);
        self.take(usize::try_from(length).ok()?)
    }

    /// Name of a table entry, and whether its value is readable; `None` if the end of the entry cannot be found.
    fn entry(&mut self, depth: usize) -> Option<(&'a [u8], bool)> {
        let name = self.short_string()?;
        Some((name, self.value(depth)?))
    }

    /// Skips a value. Returns whether it is readable; `None` if its end cannot be found.
    fn value(&mut self, depth: usize) -> Option<bool> {
        let fixed = match *self.take(1)?.first()? {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'L' | b'l' | b'd' | b'T' => 8,
            b'S' | b'x' => return self.long_bytes().map(|_| true),
            b'F' => return self.long_bytes().map(|content| depth > 0 && readable_table(content, depth - 1)),
            b'A' => return self.long_bytes().map(|content| depth > 0 && readable_array(content, depth - 1)),
            _ => return None,
        };
        self.take(fixed).map(|_| true)
    }

    /// Bytes between this position and a later one.
    fn up_to(self, later: Self) -> &'a [u8] {
        &self.0[..self.0.len() - later.0.len()]
    }
}
