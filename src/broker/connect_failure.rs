//! Cause and cure of a failed connection, without the password.

use std::error::Error;
use std::io;

use lapin::protocol::AMQPError;
use rustls::CertificateError;

use super::error::BrokerError;
use crate::tls::find_error;

/// Cure of a failure that names no cause of its own.
const CHECK_ADDRESS: &str = "check that RabbitMQ is running and that broker.url names its port for AMQP; a port for TLS \
                             requires amqps://";
const SET_CLIENT_CERTIFICATE: &str =
    "if the broker requires client certificates, set broker.client_certificate_file to one that it trusts";

/// Describes a failed connection as cause and cure.
pub(super) fn describe(error: &BrokerError, is_tls: bool) -> String {
    let (cause, cure) = match error {
        BrokerError::Lost { source, .. } => explain(source.as_ref(), is_tls),
        other => (other.to_string(), CHECK_ADDRESS),
    };
    format!("{cause}; {cure}")
}

fn explain(error: &(dyn Error + 'static), is_tls: bool) -> (String, &'static str) {
    if let Some(refused) = find_error::<AMQPError>(error) {
        let cause = refused.get_message().as_str().trim_end_matches('.');
        return (cause.to_owned(), cure_of_refusal(refused.get_id(), cause));
    }
    if let Some(tls) = find_error::<rustls::Error>(error) {
        return (format!("TLS failed: {tls}"), cure_of_tls(tls));
    }
    let Some(failed) = find_error::<io::Error>(error) else { return (error.to_string(), CHECK_ADDRESS) };
    let cause = failed.to_string();
    let cure = match failed.kind() {
        io::ErrorKind::ConnectionRefused => "start RabbitMQ, or correct the host and port in broker.url",
        io::ErrorKind::TimedOut => "correct the host and port in broker.url, or open the firewalls between",
        _ if cause.contains("failed to lookup address") => "correct the host in broker.url, or the DNS of this machine",
        // A broker often closes the socket over a missing certificate before the reason arrives.
        _ if is_tls => SET_CLIENT_CERTIFICATE,
        _ => CHECK_ADDRESS,
    };
    (cause, cure)
}

fn cure_of_refusal(code: u16, cause: &str) -> &'static str {
    const ACCESS_REFUSED: u16 = 403;
    const NOT_ALLOWED: u16 = 530;
    match code {
        ACCESS_REFUSED if cause.contains("localhost") => {
            "create a user with `rabbitmqctl add_user`, and set it in broker.url"
        }
        ACCESS_REFUSED => "correct the user and password in broker.url",
        NOT_ALLOWED if cause.contains("limit") => {
            "raise the limit (`rabbitmqctl set_vhost_limits` or `set_user_limits`), or lower the number of replicas and other clients"
        }
        NOT_ALLOWED if cause.contains("not found") => {
            "create it with `rabbitmqctl add_vhost`, or correct the virtual host in broker.url (%2f is the default one)"
        }
        NOT_ALLOWED if cause.contains("refused") => {
            "grant it with `rabbitmqctl set_permissions -p`, or correct the virtual host in broker.url"
        }
        _ => CHECK_ADDRESS,
    }
}

fn cure_of_tls(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "set broker.ca_file to the authority of the broker's certificate"
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "set broker.server_name to a name in the broker's certificate, or use that name in broker.url",
        rustls::Error::InvalidCertificate(_) => {
            "replace the broker's certificate, or correct the clock of this machine"
        }
        rustls::Error::InvalidMessage(_) => {
            "the port may not use TLS: name the port for TLS in broker.url, or begin the address with amqp://"
        }
        _ => SET_CLIENT_CERTIFICATE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(source: impl Error + Send + Sync + 'static, is_tls: bool) -> String {
        describe(&BrokerError::Lost { doing: "connecting", source: Box::new(source) }, is_tls)
    }

    #[test]
    fn refusals_that_take_a_special_broker_name_their_cure() {
        for (code, cause, cure) in [
            (403, "ACCESS_REFUSED - user 'guest' can only connect via localhost", "rabbitmqctl add_user"),
            (530, "NOT_ALLOWED - user connection limit (1) is reached", "set_user_limits"),
            (530, "NOT_ALLOWED - node connection limit (9) is reached", "number of replicas"),
            (541, "INTERNAL_ERROR - access to vhost 'a' refused: vhost 'a' is down", "RabbitMQ is running"),
        ] {
            assert!(cure_of_refusal(code, cause).contains(cure), "{cause}");
        }
    }

    #[test]
    fn a_broken_connection_is_explained_by_its_kind() {
        let io = |kind| io::Error::from(kind);
        assert!(described(io(io::ErrorKind::TimedOut), false).contains("firewalls"));
        assert!(described(io(io::ErrorKind::UnexpectedEof), false).contains("requires amqps://"));
        assert!(described(io(io::ErrorKind::ConnectionReset), true).contains("broker.client_certificate_file"));
        let expired = rustls::Error::InvalidCertificate(CertificateError::Expired);
        assert!(described(io::Error::other(expired), true).contains("replace the broker's certificate"));
        let slow = BrokerError::TimedOut { doing: "connecting", after: std::time::Duration::from_secs(5) };
        assert!(describe(&slow, false).ends_with(CHECK_ADDRESS));
    }
}
