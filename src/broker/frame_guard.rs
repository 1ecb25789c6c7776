//! Guard between socket and AMQP client: no incoming frame can fail the client's parser.
//!
//! Content headers are repaired by [`content_header::repair`], short strings of methods that carry names or texts of
//! others are made UTF-8, and bodies above [`MAX_BODY_KEPT`] are discarded. Everything else passes unchanged.

use std::collections::HashMap;
use std::io;

use super::content_header;

/// Largest body that is kept in memory. Requests have at most 256 KiB.
pub(super) const MAX_BODY_KEPT: u64 = 1024 * 1024;
/// Largest method or header frame: far above any negotiated frame size.
const MAX_FRAME: usize = 16 * 1024 * 1024;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
/// Frame type, channel and size, and the end marker.
const PREFIX: usize = 7;
const OVERHEAD: usize = PREFIX + 1;

/// Filter for the bytes that a broker sends.
#[derive(Debug, Default)]
pub(super) struct FrameGuard {
    /// Beginning of a frame that is not complete.
    partial: Vec<u8>,
    /// Rest of a frame that passes unchanged.
    passing: usize,
    /// Rest of a frame that is discarded; one of the two is zero.
    discarding: usize,
    /// Rest of the discarded body, by channel.
    discarded: HashMap<u16, u64>,
    /// Negotiated frame size; 0 until then, and for no limit.
    frame_max: usize,
    ready: Vec<u8>,
    taken: usize,
}

impl FrameGuard {
    /// Moves bytes for the client into `buf` and returns their number.
    pub(super) fn take(&mut self, buf: &mut [u8]) -> usize {
        let rest = &self.ready[self.taken..];
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        if self.taken == self.ready.len() {
            self.ready.clear();
            self.taken = 0;
        }
        count
    }

    /// Filters bytes from the socket.
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.passing > 0 || self.discarding > 0 {
                bytes = self.continue_frame(bytes);
                continue;
            }
            let wanted = self.wanted()?.saturating_sub(self.partial.len()).min(bytes.len());
            self.partial.extend(&bytes[..wanted]);
            bytes = &bytes[wanted..];
            self.proceed()?;
        }
        Ok(())
    }

    /// Passes or discards bytes of the current frame and returns those after it.
    fn continue_frame<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let count = bytes.len().min(self.passing.max(self.discarding));
        let (current, rest) = bytes.split_at(count);
        if self.passing > 0 {
            self.passing -= count;
            self.ready.extend(current);
        } else {
            self.discarding -= count;
        }
        rest
    }

    /// Length that the partial frame must have for the next step.
    fn wanted(&self) -> io::Result<usize> {
        match self.size() {
            Some(size) if size > MAX_FRAME => Err(invalid("frame too large")),
            Some(size) => Ok(size + OVERHEAD),
            None => Ok(PREFIX),
        }
    }

    fn size(&self) -> Option<usize> {
        let size = self.partial.get(3..PREFIX)?.try_into().ok()?;
        usize::try_from(u32::from_be_bytes(size)).ok()
    }

    fn proceed(&mut self) -> io::Result<()> {
        let Some(size) = self.size() else { return Ok(()) };
        let channel = u16::from_be_bytes([self.partial[1], self.partial[2]]);
        match self.partial[0] {
            METHOD | HEADER if self.partial.len() < size + OVERHEAD => {}
            METHOD => {
                let mut frame = std::mem::take(&mut self.partial);
                self.repair_method(&mut frame[PREFIX..PREFIX + size])?;
                self.ready.extend(frame);
            }
            HEADER => {
                let frame = std::mem::take(&mut self.partial);
                self.repair_header(channel, &frame[PREFIX..PREFIX + size]);
            }
            BODY if self.discarded.contains_key(&channel) => {
                self.partial.clear();
                self.discarding = size + 1;
                self.count_discarded(channel, size as u64);
            }
            _ => {
                // A body, a heartbeat, or the protocol header of a broker that refuses ours.
                self.ready.append(&mut self.partial);
                self.passing = size + 1;
            }
        }
        Ok(())
    }

    fn count_discarded(&mut self, channel: u16, size: u64) {
        if let Some(left) = self.discarded.get_mut(&channel) {
            *left = left.saturating_sub(size);
            if *left == 0 {
                self.discarded.remove(&channel);
            }
        }
    }

    fn repair_header(&mut self, channel: u16, payload: &[u8]) {
        let size = content_header::body_size(payload);
        self.discarded.remove(&channel);
        if size > MAX_BODY_KEPT {
            self.discarded.insert(channel, size);
        }
        let capacity = if self.frame_max == 0 { usize::MAX } else { self.frame_max - OVERHEAD };
        let repaired = content_header::repair(payload, capacity, size > MAX_BODY_KEPT);
        self.ready.push(HEADER);
        self.ready.extend(channel.to_be_bytes());
        self.ready.extend(u32::try_from(repaired.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.ready.extend(repaired);
        self.ready.push(0xCE);
    }

    fn repair_method(&mut self, payload: &mut [u8]) -> io::Result<()> {
        let Some((id, arguments)) = payload.split_at_mut_checked(4) else { return Ok(()) };
        match [id[1], id[3]] {
            [10, 10] => return check_start(arguments),
            [10, 30] => self.note_tune(arguments),
            _ => {}
        }
        // Layout of the arguments: widths of numbers, and `s` for short strings with names or texts of others.
        let layout: &[u8] = match [id[1], id[3]] {
            // connection.close, channel.close, connection.blocked
            [10, 50] | [20, 40] => b"2s",
            [10, 60] => b"s",
            // queue.declare-ok, basic.consume-ok, basic.cancel, basic.cancel-ok, basic.get-empty
            [50, 11] | [60, 21 | 30 | 31 | 72] => b"s",
            // basic.return, basic.deliver, basic.get-ok
            [60, 50] => b"2sss",
            [60, 60] => b"s81ss",
            [60, 71] => b"81ss",
            _ => b"",
        };
        repair_short_strings(arguments, layout);
        Ok(())
    }

    fn note_tune(&mut self, arguments: &[u8]) {
        if let Some(max) = arguments.get(2..6).and_then(|max| max.try_into().ok()) {
            let max = usize::try_from(u32::from_be_bytes(max)).unwrap_or(0);
            // Below 4,096 the client keeps to 4,096, the least that AMQP allows.
            self.frame_max = if max == 0 { 0 } else { max.max(4096) };
        }
    }
}

/// Refuses a `connection.start` whose server properties the client cannot parse.
pub(super) fn check_start(arguments: &[u8]) -> io::Result<()> {
    let table = arguments.get(2..6).and_then(|length| length.try_into().ok()).and_then(|length| {
        let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
        arguments.get(6..)?.get(..length)
    });
    match table {
        Some(table) if content_header::is_readable_table(table) => Ok(()),
        _ => Err(invalid("unreadable connection.start")),
    }
}

/// Replaces bytes that are not UTF-8 by question marks; lengths stay the same.
fn repair_short_strings(mut arguments: &mut [u8], layout: &[u8]) {
    for part in layout {
        let is_text = *part == b's';
        let (skipped, length) = match arguments.first() {
            Some(length) if is_text => (1, usize::from(*length)),
            _ => (0, usize::from(part.saturating_sub(b'0'))),
        };
        let Some((text, rest)) = arguments.split_at_mut_checked(skipped + length) else { return };
        if is_text {
            repair_utf8(&mut text[skipped..]);
        }
        arguments = rest;
    }
}

fn repair_utf8(mut text: &mut [u8]) {
    while let Err(error) = std::str::from_utf8(text) {
        let (start, length) = (error.valid_up_to(), error.error_len());
        let end = length.map_or(text.len(), |length| start + length);
        text[start..end].fill(b'?');
        text = &mut text[end..];
    }
}

fn invalid(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests;
