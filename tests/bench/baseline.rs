//! Baselines: a download that discards the bodies, and an upsert of existing rows.

use std::io::Read;
use std::time::Instant;

use flate2::bufread::MultiGzDecoder;
use inventoryd::domain::catalog::{Catalog, Collection};
use inventoryd::domain::policy_type::Shape;
use reqwest::Certificate;
use reqwest::Client;
use serde_json::Value;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::rig::Result;
use super::world::{CLIENT_ID, CLIENT_SECRET, World};

/// Rows of one baseline statement.
const BATCH: usize = 1_000;

/// Lists that belong to a single policy type each: keys and first links (relative to the root).
pub struct Lists {
    /// Keys of the policy types.
    pub keys: Vec<String>,
    /// First link of each list, as the daemon requests it.
    pub links: Vec<String>,
}

impl Lists {
    /// Returns the first `count` lists of the catalog.
    pub fn first(count: usize) -> Self {
        Self::of(count, |_| true)
    }

    /// Returns the first `count` lists without `$top` that count against Intune's default limits.
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

    /// Returns the keys.
    pub fn types(&self) -> Vec<&str> {
        self.keys.iter().map(String::as_str).collect()
    }

    /// Returns the paths with their API versions.
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

/// Minimal client of the simulated Graph, with the daemon's TLS, HTTP/2 and compression settings.
pub struct Graph {
    /// HTTP client.
    pub http: Client,
    root: String,
}

impl Graph {
    /// Creates a client that trusts the environment's simulator.
    pub fn new(world: &World) -> Result<Self> {
        let authority = Certificate::from_pem(&std::fs::read(&world.ca_file)?)?;
        let http = Client::builder()
            .tls_certs_merge([authority])
            .no_proxy()
            .http2_initial_stream_window_size(4 << 20)
            .http2_initial_connection_window_size(16 << 20)
            .build()?;
        Ok(Self { http, root: world.graph.clone() })
    }

    /// Fetches a token for a tenant, formatted as an `Authorization` value.
    pub async fn token(&self, tenant: Uuid) -> Result<String> {
        let form = format!(
            "grant_type=client_credentials&client_id={CLIENT_ID}&client_secret={CLIENT_SECRET}&scope={}%2F.default",
            self.root.replace(':', "%3A").replace('/', "%2F")
        );
        let request = self.http.post(format!("{}/{tenant}/oauth2/v2.0/token", self.root));
        let request = request.header("content-type", "application/x-www-form-urlencoded").body(form);
        let response: Value = serde_json::from_slice(&request.send().await?.bytes().await?)?;
        let token = response["access_token"].as_str().ok_or_else(|| format!("no token: {response}"))?;
        Ok(format!("Bearer {token}"))
    }

    /// Fetches one link; returns the decompressed body.
    pub async fn get(&self, link: &str, token: &str) -> Result<Vec<u8>> {
        let request = self.http.get(link).header("authorization", token).header("accept", "application/json");
        let request = request.header("prefer", "include-unknown-enum-members").header("accept-encoding", "gzip");
        let response = request.send().await?;
        if response.status() != 200 {
            return Err(format!("Graph responded with {}", response.status()).into());
        }
        let is_compressed = response.headers().contains_key("content-encoding");
        let received = response.bytes().await?;
        let mut body = Vec::new();
        if is_compressed {
            MultiGzDecoder::new(&received[..]).read_to_end(&mut body)?;
        } else {
            body.extend_from_slice(&received);
        }
        Ok(body)
    }

    /// Downloads the lists page by page, discards them, and returns the seconds.
    pub async fn download(&self, lists: &Lists, token: &str) -> Result<f64> {
        let begun = Instant::now();
        for first in &lists.links {
            let mut link = Some(format!("{}/{first}", self.root));
            while let Some(this) = link {
                link = next_link(&self.get(&this, token).await?);
            }
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Returns the absolute link of a path.
    pub fn link(&self, path: &str) -> String {
        format!("{}/{path}", self.root)
    }
}

/// Extracts the next link, which the simulator writes before the objects and without escapes.
fn next_link(body: &[u8]) -> Option<String> {
    let head = String::from_utf8_lossy(&body[..body.len().min(16 << 10)]);
    let (_, rest) = head.split_once("\"@odata.nextLink\":\"")?;
    rest.split('"').next().map(str::to_owned)
}

/// Rows of a policy type, by column.
struct Columns {
    policy_type: String,
    category: String,
    ids: Vec<String>,
    names: Vec<Option<String>>,
    platforms: Vec<Option<String>>,
    metas: Vec<String>,
}

/// Rows written by the daemon, ready to be written again.
pub struct Rows(Vec<Columns>);

impl Rows {
    /// Reads the inventory in the order in which it was written.
    pub async fn read(world: &World) -> Result<Self> {
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
            let columns = all.last_mut().ok_or("columns were pushed above")?;
            columns.ids.push(row.get(2));
            columns.names.push(row.get(3));
            columns.platforms.push(row.get(4));
            columns.metas.push(row.get(5));
        }
        Ok(Self(all))
    }

    /// Counts the rows.
    pub fn count(&self) -> usize {
        self.0.iter().map(|columns| columns.ids.len()).sum()
    }

    /// Renames every hundredth row.
    pub fn change(&mut self, mark: usize) {
        for name in self.0.iter_mut().flat_map(|columns| columns.names.iter_mut().step_by(100)) {
            *name = Some(format!("changed {mark}"));
        }
    }

    /// Writes the rows to `baseline_items` on one connection and returns the seconds.
    pub async fn upsert(&self, db: &mut PgConnection, tenant: Uuid) -> Result<f64> {
        let begun = Instant::now();
        for columns in &self.0 {
            for start in (0..columns.ids.len()).step_by(BATCH) {
                let end = columns.ids.len().min(start + BATCH);
                sqlx::query(UPSERT)
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

const UPSERT: &str =
    "insert into baseline_items as i (tenant_id, policy_type, external_id, display_name, category, platform,
       meta_jsonb, first_seen_at, last_changed_at, last_seen_at, last_seen_run_id)
select $1, $2, u.id, u.name, $3, u.platform, u.meta::jsonb, now(), now(), now(), $1
  from unnest($4::text[], $5::text[], $6::text[], $7::text[]) u(id, name, platform, meta)
on conflict (tenant_id, policy_type, external_id) do update set
  display_name = excluded.display_name, category = excluded.category, platform = excluded.platform,
  meta_jsonb = excluded.meta_jsonb, last_seen_at = excluded.last_seen_at, last_seen_run_id = excluded.last_seen_run_id";
