//! Publisher that writes AMQP frames by hand, for messages that no client library can express.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::world::World;

/// Properties of a content header, encoded: flags, then values.
#[derive(Debug, Clone, Default)]
pub struct RawProperties {
    /// Flag bits, `content_type` at 15.
    pub flags: u16,
    /// Encoded values in the order of their flags.
    pub values: Vec<u8>,
}

impl RawProperties {
    /// One short-string property by the bit of its flag.
    pub fn short_string(bit: u16, text: &[u8]) -> Self {
        Self { flags: 1 << bit, values: short(text) }
    }

    /// A headers table with one entry.
    pub fn header(name: &[u8], value: &[u8]) -> Self {
        Self { flags: 1 << 13, values: long(&[&short(name), value].concat()) }
    }
}

/// Encodes a short string.
pub fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

/// Encodes a long string or a table.
pub fn long(content: &[u8]) -> Vec<u8> {
    [&u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
}

/// Encodes a value of tables nested `depth` deep.
pub fn nested(depth: usize) -> Vec<u8> {
    (0..depth).fold(b"t\x01".to_vec(), |inner, _| [b"F", &long(&[&short(b"n"), &inner[..]].concat())[..]].concat())
}

/// Properties that end an unguarded client's session or process, with the name that the dead letter must give.
pub fn unreadable() -> Vec<(RawProperties, &'static str)> {
    vec![
        (RawProperties::header(b"deep", &nested(1000)), "headers.deep"),
        (RawProperties::header(b"deep", &nested(4000)), "headers.deep"),
        (RawProperties::header(b"M\xfcller", b"t\x01"), "headers"),
        (RawProperties::short_string(15, b"text/\xe4"), "content_type"),
        (RawProperties::short_string(14, b"\xff"), "content_encoding"),
        (RawProperties::short_string(10, b"\xff"), "correlation_id"),
        (RawProperties::short_string(9, b"\xff"), "reply_to"),
        (RawProperties::short_string(7, b"M\xfcller"), "message_id"),
        (RawProperties::short_string(5, b"\xff"), "type"),
        (RawProperties::short_string(3, b"\xff"), "app_id"),
    ]
}

/// Publishes one message to the requests exchange of `world` and waits for the confirm.
pub async fn publish(world: &World, body: &[u8], properties: RawProperties) {
    assert!(try_publish(world, body, properties).await, "the message is published");
}

/// Publishes one message; returns whether it was confirmed.
pub async fn try_publish(world: &World, body: &[u8], properties: RawProperties) -> bool {
    let (url, exchange) = (world.amqp_url.clone(), format!("{}inventory.sync", world.prefix));
    let body = body.to_vec();
    let publish = move || {
        let mut connection = Connection::open(&url);
        connection.publish(&exchange, &body, &properties);
    };
    tokio::task::spawn_blocking(publish).await.is_ok()
}

struct Connection(TcpStream);

impl Connection {
    fn open(url: &str) -> Self {
        let url = url::Url::parse(url).unwrap();
        let socket = TcpStream::connect((url.host_str().unwrap(), url.port().unwrap_or(5672))).unwrap();
        let mut this = Self(socket);
        this.0.write_all(b"AMQP\x00\x00\x09\x01").unwrap();
        this.expect(10, 10);
        let login = format!("\0{}\0{}", url.username(), url.password().unwrap_or_default());
        let start_ok = [long(b""), short(b"PLAIN"), long(login.as_bytes()), short(b"en_US")].concat();
        this.method(0, 10, 11, &start_ok);
        let mut tune = this.expect(10, 30);
        // No heartbeats.
        tune[6..8].fill(0);
        this.method(0, 10, 31, &tune);
        let vhost = url.path().trim_start_matches('/').replace("%2f", "/").replace("%2F", "/");
        let vhost = if vhost.is_empty() { "/".to_owned() } else { vhost };
        this.method(0, 10, 40, &[short(vhost.as_bytes()), short(b""), vec![0]].concat());
        this.expect(10, 41);
        this.method(1, 20, 10, &short(b""));
        this.expect(20, 11);
        this.method(1, 85, 10, &[0]);
        this.expect(85, 11);
        this
    }

    fn publish(&mut self, exchange: &str, body: &[u8], properties: &RawProperties) {
        let arguments = [&[0, 0], &short(exchange.as_bytes())[..], &short(b"sync.requested"), &[0]].concat();
        self.method(1, 60, 40, &arguments);
        let size = (body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], &properties.flags.to_be_bytes(), &properties.values].concat();
        self.frame(2, 1, &header);
        for part in body.chunks(100_000) {
            self.frame(3, 1, part);
        }
        self.expect(60, 80);
    }

    fn method(&mut self, channel: u16, class: u8, method: u8, arguments: &[u8]) {
        self.frame(1, channel, &[&[0, class, 0, method], arguments].concat());
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let frame = [&[kind], &channel.to_be_bytes()[..], &long(payload), &[0xCE]].concat();
        self.0.write_all(&frame).unwrap();
    }

    /// Reads frames up to the expected method and returns its arguments.
    fn expect(&mut self, class: u8, method: u8) -> Vec<u8> {
        loop {
            let mut prefix = [0; 7];
            self.0.read_exact(&mut prefix).unwrap();
            let mut payload = vec![0; u32::from_be_bytes(prefix[3..].try_into().unwrap()) as usize + 1];
            self.0.read_exact(&mut payload).unwrap();
            payload.pop();
            if prefix[0] != 1 {
                continue;
            }
            assert_eq!((payload[1], payload[3]), (class, method), "{}", String::from_utf8_lossy(&payload));
            return payload.split_off(4);
        }
    }
}
