//! Graph requests: authorisation, rules, throttling and response.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::response::Response;
use uuid::Uuid;

use super::Shared;
use super::errors::CallIds;
use super::faults;
use super::page;
use super::paging::Position;
use super::reply::{Delivery, Reply};
use super::rules::{Action, Endpoint, Probe};
use super::server::Connection;
use super::stats::{RequestRecord, unix_ms};
use super::token::Bearer;

const AUTHENTICATE: &str = "Bearer realm=\"\", authorization_uri=\"https://login.example.invalid/common/oauth2/authorize\", \
                            client_id=\"00000003-0000-0000-c000-000000000000\"";

/// Graph request, parsed.
#[derive(Debug)]
pub struct Call {
    /// HTTP method.
    pub method: Method,
    /// Version and path, without the leading slash.
    pub path: String,
    /// The raw query.
    pub query: String,
    /// The host and port that the client wrote: links lead back through whatever it came through.
    pub host: String,
    /// `true` if the client accepts gzip.
    pub takes_gzip: bool,
    /// The ids of the answer.
    pub ids: CallIds,
    /// Result of checking the token.
    pub bearer: Bearer,
    /// The page of the listing, as far as one can tell before the link is checked.
    pub page: u32,
}

impl Call {
    fn read(shared: &Shared, request: &Request) -> Call {
        let headers = request.headers();
        let authority = request.uri().authority().map(ToString::to_string);
        let query = request.uri().query().unwrap_or_default();
        let token = page::raw_option(query, "$skiptoken");
        Call {
            method: request.method().clone(),
            path: request.uri().path().trim_matches('/').to_owned(),
            query: query.to_owned(),
            host: authority.unwrap_or_else(|| text(headers, "host")),
            takes_gzip: text(headers, "accept-encoding").contains("gzip"),
            ids: call_ids(shared, headers),
            bearer: shared.tokens.check(headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok())),
            page: token.and_then(Position::peek).map_or(1, |position| position.page),
        }
    }

    /// The tenant that may ask.
    pub fn tenant(&self) -> Option<Uuid> {
        match self.bearer {
            Bearer::Tenant(tenant) => Some(tenant),
            Bearer::Expired | Bearer::Unknown => None,
        }
    }
}

/// Handles every path except the token endpoint and the admin paths.
pub async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let call = Call::read(&shared, &request);
    let connection = request.extensions().get::<Connection>().cloned();
    let mut record = record(&request, &call.ids, call.tenant());
    record.page = call.page;
    let in_flight = shared.stats.begin(call.tenant());
    let (reply, objects) = judge(&shared, &call).await;
    record.status = if reply.delivery == Delivery::Never { 0 } else { reply.status };
    shared.stats.graph(record, objects);
    drop(in_flight);
    send(reply, call.takes_gzip, &call.ids, connection).await
}

/// Handles the token endpoint.
pub async fn answer_token(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let ids = call_ids(&shared, request.headers());
    let takes_gzip = text(request.headers(), "accept-encoding").contains("gzip");
    let connection = request.extensions().get::<Connection>().cloned();
    let path = request.uri().path().trim_matches('/').to_owned();
    let name = path.split('/').next().unwrap_or_default().to_owned();
    let tenant = Uuid::try_parse(&name).ok();
    let mut record = record(&request, &ids, tenant);
    let form = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap_or_default();
    let probe = Probe { on: Endpoint::Token, tenant, path: &path, page: 1 };
    pause(shared.latency_ms.load(Ordering::Relaxed)).await;
    let action = shared.rules.apply(&probe).await;
    let replaced = action.as_ref().and_then(|action| faults::instead_of_token(action, &path, &ids));
    let is_foreign = action == Some(Action::ForeignToken);
    let mut reply = replaced.unwrap_or_else(|| shared.tokens.answer(&name, &form, &ids, is_foreign));
    if let Some(action) = &action {
        faults::change_body(action, &mut reply);
        reply.delivery = faults::delivery(action).unwrap_or(reply.delivery);
    }
    record.status = if reply.delivery == Delivery::Never { 0 } else { reply.status };
    shared.stats.token(record);
    send(reply, takes_gzip, &ids, connection).await
}

async fn judge(shared: &Shared, call: &Call) -> (Reply, u64) {
    let refused = |reply| (reply, 0);
    pause(shared.latency_ms.load(Ordering::Relaxed)).await;
    if call.method != Method::GET {
        return refused(Reply::usual_error(405, &call.ids).with_header("allow", "GET".into()));
    }
    let tenant = match call.bearer {
        Bearer::Tenant(tenant) => tenant,
        Bearer::Expired => {
            return refused(unauthorized("Lifetime validation failed, the token is expired.", &call.ids));
        }
        Bearer::Unknown => return refused(unauthorized("Access token is empty or could not be validated.", &call.ids)),
    };
    if let Err(over) = shared.throttle.admit(tenant, &call.path) {
        if over.is_early {
            shared.stats.early(tenant);
        }
        let reply = Reply::usual_error(429, &call.ids);
        return refused(match over.retry_after {
            Some(value) => reply.with_header("retry-after", value),
            None => reply,
        });
    }
    let probe = Probe { on: Endpoint::Graph, tenant: Some(tenant), path: &call.path, page: call.page };
    let action = shared.rules.apply(&probe).await;
    if let Some(reply) = action.as_ref().and_then(|action| faults::instead_of_graph(action, &call.path, &call.ids)) {
        return refused(reply);
    }
    if let Some(reply) = action.as_ref().and_then(|action| faults::refused_option(action, &call.query, &call.ids)) {
        return refused(reply);
    }
    let (mut reply, objects) = page::build(shared, call, tenant, action.as_ref());
    if let Some(action) = &action {
        faults::change_body(action, &mut reply);
        reply.delivery = faults::delivery(action).unwrap_or(reply.delivery);
    }
    (reply, objects)
}

async fn send(reply: Reply, takes_gzip: bool, ids: &CallIds, connection: Option<Connection>) -> Response {
    if reply.delivery == Delivery::Never {
        if let Some(connection) = connection {
            connection.cut();
        }
        // The connection takes this future with it; the wait only gives it the time.
        pause(5_000).await;
    }
    reply.into_response(takes_gzip, ids)
}

fn unauthorized(message: &str, ids: &CallIds) -> Reply {
    Reply::error(401, "InvalidAuthenticationToken", message, ids).with_header("www-authenticate", AUTHENTICATE.into())
}

fn call_ids(shared: &Shared, headers: &HeaderMap) -> CallIds {
    let request = shared.next_request_id().to_string();
    let client = text(headers, "client-request-id");
    CallIds { client: if client.is_empty() { request.clone() } else { client }, request }
}

fn record(request: &Request, ids: &CallIds, tenant: Option<Uuid>) -> RequestRecord {
    let sent_id = request.headers().contains_key("client-request-id");
    RequestRecord {
        unix_ms: unix_ms(),
        method: request.method().to_string(),
        tenant,
        path: request.uri().path().trim_matches('/').to_owned(),
        query: page::without_token(request.uri().query().unwrap_or_default()),
        page: 1,
        status: 0,
        client_request_id: if sent_id { ids.client.clone() } else { String::new() },
        http_version: format!("{:?}", request.version()),
        connection: request.extensions().get::<Connection>().map_or(0, |connection| connection.number),
        prefer: text(request.headers(), "prefer"),
        user_agent: text(request.headers(), "user-agent"),
    }
}

fn text(headers: &HeaderMap, name: &str) -> String {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

async fn pause(ms: u64) {
    if ms > 0 {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}
