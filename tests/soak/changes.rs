//! Changes in the simulated tenants while the soak runs, and what the inventory may say of them afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rand::random_range;
use tokio::sync::watch;
use tokio::time::sleep;
use uuid::Uuid;

use crate::sim::Which;
use crate::support::world::World;

/// Policy type whose objects change; its list is not among those whose length is checked.
pub const CHANGING: &str = "deviceCompliancePolicy";
const LIST: &str = "deviceManagement/deviceCompliancePolicies";
/// Objects of the list in each changing tenant.
const OBJECTS: u32 = 60;
/// Clock of the database and of this process may differ by this much, in seconds.
const SLACK_S: f64 = 0.05;
const EVERY: Duration = Duration::from_millis(400);

/// Record of every change, with the time at which Graph showed it at the latest.
#[derive(Default)]
pub struct Changes {
    /// Name number and time of every rename, by tenant and object.
    renames: BTreeMap<(Uuid, String), Vec<(u64, f64)>>,
    /// Time of the deletion, by tenant and object.
    deletions: BTreeMap<(Uuid, String), f64>,
}

/// Renames and deletes objects until `stop`.
pub async fn make(world: Arc<World>, tenants: Vec<Uuid>, stop: watch::Receiver<bool>) -> Changes {
    let changes = Mutex::new(Changes::default());
    for tenant in &tenants {
        world.sim.set_size(Some(*tenant), Some(LIST), OBJECTS).expect("the simulator has the list");
    }
    let mut number = 0;
    while !*stop.borrow() {
        number += 1;
        let tenant = tenants[random_range(0..tenants.len())];
        changes.lock().make_one(&world, tenant, number);
        sleep(EVERY).await;
    }
    changes.into_inner()
}

impl Changes {
    fn make_one(&mut self, world: &World, tenant: Uuid, number: u64) {
        let ids = world.sim.object_ids(tenant, LIST).expect("the simulator has the list");
        let Some(id) = (!ids.is_empty()).then(|| ids[random_range(0..ids.len())].clone()) else { return };
        let which = Which::Ids(vec![id.clone()]);
        // One change in twenty is a deletion: a few objects are left after an hour.
        if random_range(0..20) == 0 {
            world.sim.delete_objects(tenant, LIST, which).expect("the object exists");
            self.deletions.insert((tenant, id), unix_s());
        } else {
            world.sim.rename_object(tenant, LIST, which, &name(number)).expect("the object exists");
            self.renames.entry((tenant, id)).or_default().push((number, unix_s()));
        }
    }

    /// Counts changes, stored names that are older than the observation they carry, and deleted objects that came back.
    pub async fn verify(&self, world: &World) -> Verified {
        let items = world
            .rows(&format!(
                "select i.tenant_id, i.external_id, i.display_name, extract(epoch from i.last_seen_at)::float8 as seen,
                        extract(epoch from l.evidence_at)::float8 as evidence, c.external_id is not null as current
                   from inventory_items i
                   left join inventory_complete_listings l using (tenant_id, policy_type)
                   left join inventory_items_current c using (tenant_id, policy_type, external_id)
                  where i.policy_type = '{CHANGING}'"
            ))
            .await;
        let mut verified = Verified { renames: self.renames.values().map(Vec::len).sum(), ..Verified::default() };
        for item in &items {
            let text = |column: &str| item[column].as_str().unwrap_or_default();
            let key = (text("tenant_id").parse().unwrap_or_default(), text("external_id").to_owned());
            let seen = item["seen"].as_f64().unwrap_or_default();
            let renames = self.renames.get(&key).map_or(&[][..], Vec::as_slice);
            // Graph showed this name, or a newer one, to every request sent after it.
            let expected = renames.iter().rev().find(|(_, at)| at + SLACK_S < seen).map(|(number, _)| *number);
            verified.items += 1;
            verified.reverted += usize::from(expected > number_in(text("display_name")));
            let Some(deleted) = self.deletions.get(&key) else { continue };
            verified.deletions += 1;
            let evidence = item["evidence"].as_f64().is_some_and(|evidence| evidence > deleted + SLACK_S);
            let restored = seen > deleted + SLACK_S || (evidence && item["current"] == true);
            verified.restored += usize::from(restored);
        }
        verified
    }
}

/// Result of [`Changes::verify`].
#[derive(Default)]
pub struct Verified {
    /// Renames made.
    pub renames: usize,
    /// Items checked.
    pub items: usize,
    /// Items whose name is older than their observation.
    pub reverted: usize,
    /// Stored items whose object was deleted.
    pub deletions: usize,
    /// Of them, observed after the deletion, or current although a later complete listing lacks them.
    pub restored: usize,
}

fn name(number: u64) -> String {
    format!("Renamed {number}")
}

fn number_in(name: &str) -> Option<u64> {
    name.strip_prefix("Renamed ")?.parse().ok()
}

#[expect(clippy::disallowed_methods, reason = "compared with times of the database, which runs on this host")]
fn unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
