//! Remote control of a simulator that runs as a program: JSON requests and responses, without a token.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Shared;
use super::limits::Limits;
use super::rules::Rule;
use super::world::Which;

type Answer = Result<Response, (StatusCode, Json<Value>)>;
type Body<T> = Result<Json<T>, JsonRejection>;

#[derive(Deserialize)]
struct Last {
    last: Option<usize>,
}

#[derive(Deserialize)]
struct RuleId {
    id: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Objects {
    tenant: Uuid,
    collection: String,
    count: Option<u32>,
    ids: Option<Vec<String>>,
    id: Option<String>,
    index: Option<u32>,
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Size {
    tenant: Option<Uuid>,
    collection: Option<String>,
    count: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Latency {
    ms: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokens {
    tenant: Option<Uuid>,
    lifetime_s: Option<u64>,
    #[serde(default)]
    expire: bool,
}

/// Everything under `/admin`.
pub fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/state", get(state).delete(reset))
        .route("/requests", get(requests))
        .route("/collections", get(collections))
        .route("/rules", get(rules).post(add_rules).delete(remove_rules))
        .route("/objects", get(list_objects))
        .route("/objects/delete", post(delete_objects))
        .route("/objects/rename", post(rename_object))
        .route("/objects/add", post(add_objects))
        .route("/size", post(size))
        .route("/latency", post(latency))
        .route("/limits", get(limits).post(set_limits))
        .route("/tokens", post(tokens))
        .route("/ca", get(ca))
}

async fn state(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.state()).into_response()
}

async fn reset(State(shared): State<Arc<Shared>>) -> Response {
    shared.reset_counters();
    Json(json!({"reset": true})).into_response()
}

async fn requests(State(shared): State<Arc<Shared>>, Query(query): Query<Last>) -> Response {
    Json(shared.recent_requests(query.last.unwrap_or(100))).into_response()
}

async fn collections(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.collections()).into_response()
}

async fn rules(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.rules()).into_response()
}

/// One rule or a list of them.
async fn add_rules(State(shared): State<Arc<Shared>>, body: Body<Value>) -> Answer {
    let values = match read(body)? {
        Value::Array(values) => values,
        value => vec![value],
    };
    let rules: Result<Vec<Rule>, _> = values.into_iter().map(serde_json::from_value).collect();
    let rules = rules.map_err(|error| refuse(error.to_string()))?;
    let ids: Vec<u64> = rules.into_iter().map(|rule| shared.add_rule(rule)).collect();
    Ok(Json(json!({"ids": ids})).into_response())
}

async fn remove_rules(State(shared): State<Arc<Shared>>, Query(query): Query<RuleId>) -> Response {
    Json(json!({"removed": shared.remove_rules(query.id)})).into_response()
}

async fn list_objects(State(shared): State<Arc<Shared>>, Query(objects): Query<ListObjects>) -> Answer {
    let found = shared.objects(objects.tenant, &objects.collection).map_err(refuse)?;
    Ok(Json(found).into_response())
}

#[derive(Deserialize)]
struct ListObjects {
    tenant: Uuid,
    collection: String,
}

async fn delete_objects(State(shared): State<Arc<Shared>>, body: Body<Objects>) -> Answer {
    let objects = read(body)?;
    let which = objects.which().map_err(refuse)?;
    let ids = shared.delete_objects(objects.tenant, &objects.collection, which).map_err(refuse)?;
    Ok(Json(json!({"deleted": ids})).into_response())
}

async fn rename_object(State(shared): State<Arc<Shared>>, body: Body<Objects>) -> Answer {
    let objects = read(body)?;
    let which = objects.which().map_err(refuse)?;
    let name = objects.name.as_deref().ok_or_else(|| refuse("name is missing".to_owned()))?;
    let id = shared.rename_object(objects.tenant, &objects.collection, which, name).map_err(refuse)?;
    Ok(Json(json!({"renamed": id})).into_response())
}

async fn add_objects(State(shared): State<Arc<Shared>>, body: Body<Objects>) -> Answer {
    let objects = read(body)?;
    let count = objects.count.ok_or_else(|| refuse("count is missing".to_owned()))?;
    let ids = shared.add_objects(objects.tenant, &objects.collection, count).map_err(refuse)?;
    Ok(Json(json!({"added": ids})).into_response())
}

async fn size(State(shared): State<Arc<Shared>>, body: Body<Size>) -> Answer {
    let size = read(body)?;
    shared.set_size(size.tenant, size.collection.as_deref(), size.count).map_err(refuse)?;
    Ok(Json(json!({"count": size.count})).into_response())
}

async fn latency(State(shared): State<Arc<Shared>>, body: Body<Latency>) -> Answer {
    let latency = read(body)?;
    shared.set_latency_ms(latency.ms);
    Ok(Json(json!({"ms": latency.ms})).into_response())
}

async fn limits(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.limits()).into_response()
}

async fn set_limits(State(shared): State<Arc<Shared>>, body: Body<Option<Limits>>) -> Answer {
    shared.set_limits(read(body)?);
    Ok(limits(State(shared)).await)
}

async fn tokens(State(shared): State<Arc<Shared>>, body: Body<Tokens>) -> Answer {
    let tokens = read(body)?;
    if let Some(lifetime_s) = tokens.lifetime_s {
        shared.set_token_lifetime_s(lifetime_s);
    }
    if tokens.expire {
        shared.expire_tokens(tokens.tenant);
    }
    Ok(Json(json!({"expired": tokens.expire})).into_response())
}

async fn ca(State(shared): State<Arc<Shared>>) -> Response {
    ([(header::CONTENT_TYPE, "application/x-pem-file")], shared.ca_pem().to_owned()).into_response()
}

impl Objects {
    fn which(&self) -> Result<Which, String> {
        match (self.count, &self.ids, &self.id, self.index) {
            (Some(count), None, None, None) => Ok(Which::Count(count)),
            (None, Some(ids), None, None) => Ok(Which::Ids(ids.clone())),
            (None, None, Some(id), None) => Ok(Which::Ids(vec![id.clone()])),
            (None, None, None, Some(index)) => Ok(Which::Index(index)),
            _ => Err("say which objects by exactly one of count, ids, id, index".to_owned()),
        }
    }
}

fn read<T>(body: Body<T>) -> Result<T, (StatusCode, Json<Value>)> {
    body.map(|Json(value)| value).map_err(|rejection| refuse(rejection.body_text()))
}

fn refuse(message: String) -> (StatusCode, Json<Value>) {
    (StatusCode::BAD_REQUEST, Json(json!({"error": message})))
}
