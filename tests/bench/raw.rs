//! The bare parts: a download that throws the bodies away, and an upsert of rows that are there already.

use std::time::Instant;

use inventoryd::domain::catalog::{Catalog, Collection};
use inventoryd::domain::policy_type::Shape;
use reqwest::Certificate;
use reqwest::Client;
use serde_json::Value;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::rig::Outcome;
use super::world::{CLIENT_ID, CLIENT_SECRET, World};

/// Rows of one bare statement.
const BATCH: usize = 1_000;

/// Lists that one policy type has for itself: their keys and first links (without the root).
pub struct Lists {
    /// The types.
    pub keys: Vec<String>,
    /// What the daemon asks for first.
    pub links: Vec<String>,
}

impl Lists {
    /// The first `count` of the catalog.
    pub fn first(count: usize) -> Self {
        Self::of(count, |_| true)
    }

    /// The first `count` whose pages have the length that Graph chooses, and that count against its limits for Intune.
    pub fn without_page_size(count: usize) -> Self {
        Self::of(count, |collection| collection.top.is_none() && collection.throttle == "intune-default")
    }

    fn of(count: usize, wanted: impl Fn(&Collection) -> bool) -> Self {
        let catalog = Catalog::built_in();
        let lists = catalog.types().filter_map(|policy_type| {
            let collection = catalog.collection_of(policy_type);
            let of_one_type = policy_type.shape == Shape::Collection
                && !policy_type.foundation
                && policy_type.discriminator.is_none()
                && collection.types.len() == 1;
            (of_one_type && wanted(collection)).then(|| (policy_type.key.clone(), first_link(collection)))
        });
        let (keys, links) = lists.take(count).unzip();
        Self { keys, links }
    }

    /// The keys, borrowed.
    pub fn types(&self) -> Vec<&str> {
        self.keys.iter().map(String::as_str).collect()
    }

    /// The paths with their versions.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.links.iter().map(|link| link.split('?').next().unwrap_or(link))
    }
}

fn first_link(collection: &Collection) -> String {
    let names: Vec<&str> = collection.select.iter().map(String::as_str).collect();
    let select = (!names.is_empty()).then(|| format!("$select={}", names.join(",")));
    let top = collection.top.map(|top| format!("$top={top}"));
    let options: Vec<String> = [select, top].into_iter().flatten().collect();
    let joint = if options.is_empty() { "" } else { "?" };
    format!("{}/{}{joint}{}", collection.api_version, collection.path, options.join("&"))
}

/// A bare client of the simulated Graph, with the same TLS, HTTP/2 and compression as the daemon's.
pub struct Graph {
    /// The client.
    pub http: Client,
    root: String,
}

impl Graph {
    /// A client that trusts the world's simulator.
    pub fn new(world: &World) -> Outcome<Self> {
        let authority = Certificate::from_pem(&std::fs::read(&world.ca_file)?)?;
        let http = Client::builder()
            .tls_certs_merge([authority])
            .no_proxy()
            .gzip(true)
            .http2_initial_stream_window_size(4 << 20)
            .http2_initial_connection_window_size(16 << 20)
            .build()?;
        Ok(Self { http, root: world.graph.clone() })
    }

    /// A token for a tenant, as the header wants it.
    pub async fn token(&self, tenant: Uuid) -> Outcome<String> {
        let form = format!(
            "grant_type=client_credentials&client_id={CLIENT_ID}&client_secret={CLIENT_SECRET}&scope={}%2F.default",
            self.root.replace(':', "%3A").replace('/', "%2F")
        );
        let request = self.http.post(format!("{}/{tenant}/oauth2/v2.0/token", self.root));
        let request = request.header("content-type", "application/x-www-form-urlencoded").body(form);
        let answer: Value = serde_json::from_slice(&request.send().await?.bytes().await?)?;
        let token = answer["access_token"].as_str().ok_or_else(|| format!("no token: {answer}"))?;
        Ok(format!("Bearer {token}"))
    }

    /// Gets one link; the body comes decompressed and whole.
    pub async fn get(&self, link: &str, token: &str) -> Outcome<Vec<u8>> {
        let request = self.http.get(link).header("authorization", token).header("accept", "application/json");
        let mut answer = request.header("prefer", "include-unknown-enum-members").send().await?;
        if answer.status() != 200 {
            return Err(format!("Graph answers {}", answer.status()).into());
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await? {
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// Downloads the lists one page after the other and throws them away; gives the seconds.
    pub async fn download(&self, lists: &Lists, token: &str) -> Outcome<f64> {
        let begun = Instant::now();
        for first in &lists.links {
            let mut link = Some(format!("{}/{first}", self.root));
            while let Some(this) = link {
                link = next_link(&self.get(&this, token).await?);
            }
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    /// The first link of a list.
    pub fn link(&self, path: &str) -> String {
        format!("{}/{path}", self.root)
    }
}

/// The next link stands in front of the objects, and nothing in it is escaped.
fn next_link(body: &[u8]) -> Option<String> {
    let head = String::from_utf8_lossy(&body[..body.len().min(16 << 10)]);
    let (_, rest) = head.split_once("\"@odata.nextLink\":\"")?;
    rest.split('"').next().map(str::to_owned)
}

/// The rows of a policy type, column by column.
struct Columns {
    policy_type: String,
    category: String,
    ids: Vec<String>,
    names: Vec<Option<String>>,
    platforms: Vec<Option<String>>,
    metas: Vec<String>,
}

/// Rows as the daemon has written them, prepared to be written again.
pub struct Rows(Vec<Columns>);

impl Rows {
    /// All that is in the inventory, in the order that it was written in.
    pub async fn read(world: &World) -> Outcome<Self> {
        let rows = sqlx::query(
            "select policy_type, category, external_id, display_name, platform, meta_jsonb::text from inventory_items
              order by policy_type, ctid",
        )
        .fetch_all(&world.db)
        .await?;
        let mut all: Vec<Columns> = Vec::new();
        for row in rows {
            let policy_type: String = row.get(0);
            if all.last().is_none_or(|columns| columns.policy_type != policy_type) {
                let (ids, names, platforms, metas) = Default::default();
                all.push(Columns { policy_type, category: row.get(1), ids, names, platforms, metas });
            }
            let columns = all.last_mut().ok_or("there is one by now")?;
            columns.ids.push(row.get(2));
            columns.names.push(row.get(3));
            columns.platforms.push(row.get(4));
            columns.metas.push(row.get(5));
        }
        Ok(Self(all))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.iter().map(|columns| columns.ids.len()).sum()
    }

    /// Gives every hundredth another name.
    pub fn change(&mut self, mark: usize) {
        for name in self.0.iter_mut().flat_map(|columns| columns.names.iter_mut().step_by(100)) {
            *name = Some(format!("changed {mark}"));
        }
    }

    /// Writes them to `bare_items`, statement by statement on one connection; gives the seconds.
    pub async fn upsert(&self, db: &mut PgConnection, tenant: Uuid) -> Outcome<f64> {
        let begun = Instant::now();
        for columns in &self.0 {
            for start in (0..columns.ids.len()).step_by(BATCH) {
                let end = columns.ids.len().min(start + BATCH);
                sqlx::query(BARE_UPSERT)
                    .bind(tenant)
                    .bind(&columns.policy_type)
                    .bind(&columns.category)
                    .bind(&columns.ids[start..end])
                    .bind(&columns.names[start..end])
                    .bind(&columns.platforms[start..end])
                    .bind(&columns.metas[start..end])
                    .execute(&mut *db)
                    .await?;
            }
        }
        Ok(begun.elapsed().as_secs_f64())
    }
}

const BARE_UPSERT: &str =
    "insert into bare_items as i (tenant_id, policy_type, external_id, display_name, category, platform,
       meta_jsonb, first_seen_at, last_changed_at, last_seen_at, last_seen_run_id)
select $1, $2, u.id, u.name, $3, u.platform, u.meta::jsonb, now(), now(), now(), $1
  from unnest($4::text[], $5::text[], $6::text[], $7::text[]) u(id, name, platform, meta)
on conflict (tenant_id, policy_type, external_id) do update set
  display_name = excluded.display_name, category = excluded.category, platform = excluded.platform,
  meta_jsonb = excluded.meta_jsonb, last_seen_at = excluded.last_seen_at, last_seen_run_id = excluded.last_seen_run_id";
