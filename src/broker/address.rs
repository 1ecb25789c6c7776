//! Parser of the addresses in `broker.url`.
//!
//! Used instead of the client's `AMQPUri::from_str`, which turns an IPv6 literal into `localhost`, reads `amqp://host/`
//! as the virtual host with the empty name, and prints the password in its `Debug` and `Display`.

use std::borrow::Cow;
use std::fmt;

use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

use super::error::BrokerError;

/// Address of one broker of the cluster. `Debug` and `Display` show host and port only.
#[derive(Clone)]
pub(super) struct Address {
    tls: bool,
    host: String,
    port: u16,
    virtual_host: String,
    user: String,
    password: SecretString,
}

impl Address {
    /// Parses the comma-separated addresses.
    pub(super) fn parse_all(text: &SecretString) -> Result<Vec<Self>, BrokerError> {
        text.expose_secret().split(',').enumerate().map(|(index, one)| Self::parse(index + 1, one.trim())).collect()
    }

    fn parse(number: usize, text: &str) -> Result<Self, BrokerError> {
        // The text contains a password: errors name the position of the address and never quote it.
        let wrong = |what: &str| BrokerError::Config(format!("broker.url, address {number}: {what}"));
        let url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
        let tls = match url.scheme() {
            "amqp" => false,
            "amqps" => true,
            _ => return Err(wrong("must begin with amqp:// or amqps://")),
        };
        if url.query().is_some() || url.fragment().is_some() {
            return Err(wrong("parameters after ? are not supported; use the keys of [broker]"));
        }
        let host = match url.host() {
            Some(Host::Domain(name)) if !name.is_empty() => {
                decode(name).ok_or_else(|| wrong("the host is not UTF-8"))?
            }
            Some(Host::Ipv4(address)) => address.to_string(),
            Some(Host::Ipv6(address)) => address.to_string(),
            _ => return Err(wrong("has no host")),
        };
        let path = url.path().strip_prefix('/').unwrap_or_default();
        let virtual_host = decode(path).ok_or_else(|| wrong("the virtual host is not UTF-8"))?;
        if virtual_host.len() > 255 {
            return Err(wrong("the virtual host has more than 255 bytes"));
        }
        let user = decode(url.username()).ok_or_else(|| wrong("the user is not UTF-8"))?;
        let password = decode(url.password().unwrap_or_default()).ok_or_else(|| wrong("the password is not UTF-8"))?;
        let anonymous = user.is_empty() && password.is_empty();
        Ok(Self {
            tls,
            host,
            port: url.port().unwrap_or(if tls { 5671 } else { 5672 }),
            // RabbitMQ has no virtual host with an empty name: a bare slash means the default one.
            virtual_host: if virtual_host.is_empty() { "/".to_owned() } else { virtual_host },
            user: if anonymous { "guest".to_owned() } else { user },
            password: if anonymous { "guest".into() } else { password.into() },
        })
    }

    /// True for an address that begins with `amqps://`.
    pub(super) fn is_tls(&self) -> bool {
        self.tls
    }

    /// Converts to the client's form. Never print it: its `Debug` shows the password.
    pub(super) fn to_uri(&self, heartbeat_s: u16) -> AMQPUri {
        AMQPUri {
            scheme: if self.tls { AMQPScheme::AMQPS } else { AMQPScheme::AMQP },
            authority: AMQPAuthority {
                userinfo: AMQPUserInfo {
                    username: self.user.clone(),
                    password: self.password.expose_secret().to_owned(),
                },
                host: self.host.clone(),
                port: self.port,
            },
            vhost: self.virtual_host.clone(),
            query: AMQPQueryString { heartbeat: Some(heartbeat_s), ..AMQPQueryString::default() },
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Percent-decodes the text; `None` if the result is not UTF-8.
fn decode(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<Address>, BrokerError> {
        Address::parse_all(&SecretString::from(text))
    }

    #[test]
    fn several_hosts_and_ipv6_literals_are_parsed() {
        let all = parse("amqp://u:p%40ss@[::1]:5673/%2fteam, amqps://u:p@rabbit-2.example").unwrap();
        assert_eq!(format!("{all:?}"), "[[::1]:5673, rabbit-2.example:5671]");
        let uri = all[0].to_uri(10);
        assert_eq!((uri.authority.host.as_str(), uri.authority.port), ("::1", 5673));
        assert_eq!(uri.authority.userinfo.password, "p@ss");
        assert_eq!((uri.vhost.as_str(), uri.query.heartbeat), ("/team", Some(10)));
        assert_eq!(all[1].to_uri(10).scheme, AMQPScheme::AMQPS);
    }

    #[test]
    fn a_bare_slash_is_the_default_virtual_host() {
        for text in ["amqp://h", "amqp://h/", "amqp://h/%2f"] {
            let uri = parse(text).unwrap()[0].to_uri(10);
            assert_eq!((uri.vhost.as_str(), uri.authority.userinfo.username.as_str()), ("/", "guest"), "{text}");
        }
    }

    #[test]
    fn errors_name_the_position_and_never_quote_the_address() {
        for text in
            ["amqp://u:hunter2@h?heartbeat=3", "http://u:hunter2@h", "amqp://u:hunter2@", "amqp://u:hunter2@h:x"]
        {
            let problem = parse(text).unwrap_err().to_string();
            assert!(problem.starts_with("broker.url, address 1: "), "{problem}");
            assert!(!problem.contains("hunter2"), "{problem}");
        }
        assert!(!format!("{:?}", parse("amqp://u:hunter2@h").unwrap()).contains("hunter2"));
    }
}
