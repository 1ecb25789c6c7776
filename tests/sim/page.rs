//! Body of one page of a list, or of one object.

use std::collections::HashMap;

use axum::body::Bytes;
use serde_json::Value;
use uuid::Uuid;

use super::Shared;
use super::cache::PageKey;
use super::faults;
use super::fixtures::{Shape, Target};
use super::graph::Call;
use super::paging::{Binding, Position};
use super::reply::{Reply, gzip, pays_to_gzip};
use super::rules::Action;
use super::select::{Select, unknown_property};
use super::text::percent_decode;
use super::world::{Place, View};

/// Options that Graph accepts and ignores.
const IGNORED: [&str; 6] = ["$filter", "$orderby", "$count", "$expand", "$search", "$format"];

/// Page lengths.
#[derive(Clone, Debug)]
pub struct PageSizes {
    /// Without `$top`.
    pub default: usize,
    /// The same for one collection.
    pub by_collection: HashMap<String, usize>,
    /// The most that `$top` gets, for one collection; without an entry it is 1,000 (200 for the update profiles).
    pub top_caps: HashMap<String, usize>,
}

impl Default for PageSizes {
    fn default() -> Self {
        PageSizes { default: 25, by_collection: HashMap::new(), top_caps: HashMap::new() }
    }
}

impl PageSizes {
    fn of(&self, pattern: &str, top: Option<usize>) -> usize {
        let bare = pattern.split_once('/').map_or(pattern, |(_, rest)| rest);
        let named = |map: &HashMap<String, usize>| map.get(pattern).or_else(|| map.get(bare)).copied();
        let is_update_profile = pattern.contains("/windows") && pattern.contains("Update");
        let cap = named(&self.top_caps).unwrap_or(if is_update_profile { 200 } else { 1_000 });
        match top {
            Some(top) => top.min(cap).max(1),
            None => named(&self.by_collection).unwrap_or(self.default).max(1),
        }
    }
}

/// A list request that was understood.
struct Listing<'a> {
    call: &'a Call,
    tenant: Uuid,
    select: Option<Select>,
    top: usize,
    /// The raw query without the token of a next link.
    query: String,
    position: Position,
}

/// Responds to an accepted request; returns the number of objects too.
pub fn build(shared: &Shared, call: &Call, tenant: Uuid, action: Option<&Action>) -> (Reply, u64) {
    match try_build(shared, call, tenant, action) {
        Ok(built) => built,
        Err((status, code, message)) => (Reply::error(status, code, &message, &call.ids), 0),
    }
}

type Refusal = (u16, &'static str, String);

fn try_build(shared: &Shared, call: &Call, tenant: Uuid, action: Option<&Action>) -> Result<(Reply, u64), Refusal> {
    let target = shared
        .world
        .catalog
        .resolve(&call.path)
        .map_err(|segment| (400, "BadRequest", format!("Resource not found for the segment '{segment}'.")))?;
    let (found, path) = match target {
        Target::List(found) => (found, call.path.as_str()),
        Target::Object(found, id) => (found, &call.path[..call.path.len() - id.len() - 1]),
    };
    let view = shared.world.view(Place { tenant, found, path });
    let listing = read_query(shared, call, tenant, &view)?;
    refuse_select(&listing, &view, action)?;
    match target {
        Target::Object(_, id) => one(&listing, &view, view.find(&percent_decode(id)), action),
        Target::List(_) if view.collection.shape == Shape::Singleton => {
            one(&listing, &view, view.page(0, 1).0.first().copied(), action)
        }
        Target::List(_) => Ok(list(shared, &listing, &view, action)),
    }
}

fn read_query<'a>(shared: &Shared, call: &'a Call, tenant: Uuid, view: &View<'_>) -> Result<Listing<'a>, Refusal> {
    let bad = |message: String| (400, "BadRequest", message);
    let (mut select, mut top) = (None, None);
    for (key, value) in pairs(&call.query) {
        let value = percent_decode(value);
        match percent_decode(key).as_str() {
            "$select" => select = Some(Select::parse(&value, view.collection).map_err(|refusal| bad(refusal.0))?),
            "$top" => {
                let parsed = value.parse().ok().filter(|top| *top > 0);
                top = Some(parsed.ok_or_else(|| bad(format!("Invalid value '{value}' for $top query option found.")))?);
            }
            "$skiptoken" => {}
            known if IGNORED.contains(&known) => {}
            other if other.starts_with('$') => {
                return Err(bad(format!("The query parameter '{other}' is not supported.")));
            }
            _ => {}
        }
    }
    let query = rest_of(&call.query);
    let binding = Binding { seed: shared.world.seed(), tenant, path: &call.path, query: &query };
    let position = match raw_option(&call.query, "$skiptoken") {
        None => Position::FIRST,
        Some(raw) => Position::read(raw, &binding)
            .ok_or_else(|| bad("The continuation token is malformed or belongs to another request.".to_owned()))?,
    };
    let top = shared.page_sizes.of(&view.collection.path, top);
    Ok(Listing { call, tenant, select, top, query, position })
}

fn refuse_select(listing: &Listing<'_>, view: &View<'_>, action: Option<&Action>) -> Result<(), Refusal> {
    let (Some(Action::RefuseSelect { property }), Some(select)) = (action, &listing.select) else { return Ok(()) };
    let first = select.raw().split(',').next().unwrap_or_default();
    let name = property.as_deref().unwrap_or(first);
    if property.is_some() && !select.names(name) {
        return Ok(());
    }
    Err((400, "BadRequest", unknown_property(name, &view.collection.entity_type).0))
}

fn one(
    listing: &Listing<'_>,
    view: &View<'_>,
    index: Option<u32>,
    action: Option<&Action>,
) -> Result<(Reply, u64), Refusal> {
    let missing = || (404, "ResourceNotFound", "Resource could not be discovered.".to_owned());
    let index = index.ok_or_else(missing)?;
    let mut objects = view.values(&view.compile(listing.select.as_ref()), &[index]);
    if let Some(action @ Action::UnknownEnum { .. }) = action {
        faults::change_objects(action, &listing.call.ids, &mut objects);
    }
    let mut object = objects.pop().ok_or_else(missing)?;
    object["@odata.context"] = Value::from(format!("{}/$entity", context(listing)));
    Ok((Reply::json(Bytes::from(object.to_string())), 1))
}

fn list(shared: &Shared, listing: &Listing<'_>, view: &View<'_>, action: Option<&Action>) -> (Reply, u64) {
    // Actions that only delay or cut a body do not change the page.
    let is_plain = action.is_none_or(|action| faults::delivery(action).is_some());
    let key = is_plain.then(|| PageKey {
        version: view.version,
        tenant: listing.tenant,
        path: listing.call.path.clone(),
        host: listing.call.host.clone(),
        query: listing.query.clone(),
        position: listing.position,
        takes_gzip: listing.call.takes_gzip,
    });
    if let Some((reply, objects)) = key.as_ref().and_then(|key| shared.pages.get(key)) {
        return (reply, objects);
    }
    let (indexes, next) = choose(listing, view, action);
    let compiled =
        shared.pages.compiled(&view.collection.path, listing.select.as_ref(), || view.compile(listing.select.as_ref()));
    let mut body = head(shared, listing, indexes.len(), next, action);
    match action.filter(|action| faults::changes_objects(action)) {
        None => view.write(&compiled, &indexes, &mut body),
        Some(action) => {
            let mut objects = view.values(&compiled, &indexes);
            faults::change_objects(action, &listing.call.ids, &mut objects);
            let text: Vec<String> = objects.iter().map(Value::to_string).collect();
            body.extend_from_slice(text.join(",").as_bytes());
        }
    }
    body.extend_from_slice(b"]}");
    let mut reply = Reply::json(Bytes::from(body));
    if listing.call.takes_gzip && pays_to_gzip(reply.body.len()) {
        reply.gzip = Some(gzip(&reply.body));
    }
    let objects = indexes.len() as u64;
    if let Some(key) = key {
        shared.pages.put(key, reply.clone(), objects);
    }
    (reply, objects)
}

/// The objects of the page and where the next one begins.
fn choose(listing: &Listing<'_>, view: &View<'_>, action: Option<&Action>) -> (Vec<u32>, Option<u32>) {
    let start = listing.position.start;
    let (mut indexes, next) = view.page(start, listing.top);
    match action {
        Some(Action::EmptyPage) => (Vec::new(), Some(start)),
        Some(Action::NoNewIds) => (view.page(0, listing.top).0, Some(start)),
        Some(Action::DuplicateIds { count }) => {
            let before = view.page(0, usize::MAX).0;
            let mut repeated: Vec<u32> = before.into_iter().filter(|index| *index < start).collect();
            let mut all = repeated.split_off(repeated.len().saturating_sub(*count as usize));
            all.append(&mut indexes);
            (all, next)
        }
        _ => (indexes, next),
    }
}

/// Everything before the objects. `@odata.count` is the length of the page, as wrong as the real one.
fn head(shared: &Shared, listing: &Listing<'_>, count: usize, next: Option<u32>, action: Option<&Action>) -> Vec<u8> {
    let call = listing.call;
    let link = match (action, next) {
        (Some(Action::RepeatLink), _) if call.query.is_empty() => Some(format!("https://{}/{}", call.host, call.path)),
        (Some(Action::RepeatLink), _) => Some(format!("https://{}/{}?{}", call.host, call.path, call.query)),
        (Some(Action::ForeignLink { host }), next) => {
            Some(next_link(shared, listing, host, next.unwrap_or(listing.position.start)))
        }
        (_, Some(next)) => Some(next_link(shared, listing, &call.host, next)),
        (_, None) => None,
    };
    let quoted = |text: String| Value::from(text).to_string();
    let mut head = format!("{{\"@odata.context\":{},\"@odata.count\":{count}", quoted(context(listing)));
    if let Some(link) = link {
        head.push_str(",\"@odata.nextLink\":");
        head.push_str(&quoted(link));
    }
    head.push_str(",\"value\":[");
    head.into_bytes()
}

fn next_link(shared: &Shared, listing: &Listing<'_>, host: &str, start: u32) -> String {
    let Listing { call, tenant, query, .. } = listing;
    let binding = Binding { seed: shared.world.seed(), tenant: *tenant, path: &call.path, query };
    let token = Position { start, page: listing.position.page.saturating_add(1) }.token(&binding);
    let joint = if query.is_empty() { "" } else { "&" };
    format!("https://{host}/{}?{query}{joint}$skiptoken={token}", call.path)
}

fn context(listing: &Listing<'_>) -> String {
    let Call { host, path, .. } = listing.call;
    let (version, bare) = path.split_once('/').unwrap_or((path, ""));
    let shown = listing.select.as_ref().map(|select| format!("({})", select.raw())).unwrap_or_default();
    format!("https://{host}/{version}/$metadata#{bare}{shown}")
}

/// One option of a raw query, still encoded.
pub fn raw_option<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    pairs(query).find(|(key, _)| percent_decode(key) == name).map(|(_, value)| value)
}

/// Raw query for the log, without the token of a next link.
pub fn without_token(query: &str) -> String {
    let has_token = raw_option(query, "$skiptoken").is_some();
    let rest = rest_of(query);
    match (has_token, rest.is_empty()) {
        (false, _) => rest,
        (true, true) => "$skiptoken=...".to_owned(),
        (true, false) => format!("{rest}&$skiptoken=..."),
    }
}

fn rest_of(query: &str) -> String {
    let kept: Vec<&str> = query
        .split('&')
        .filter(|pair| !pair.is_empty() && percent_decode(pair.split('=').next().unwrap_or_default()) != "$skiptoken")
        .collect();
    kept.join("&")
}

fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}
