//! Objects of every tenant, generated from the seed by their index. Only deletions, renames and additions are stored.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::fixtures::{Catalog, Collection, Shape, parent_id};
use super::seed;
use super::select::Select;
use super::template::{Compiled, IdKind, Instance, guid_in, object_id};
use super::text;

/// Numbers of objects in collections: the most specific setting wins.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    /// Without any other setting; a shared collection still shows each of its kinds once.
    pub default: u32,
    /// By tenant, by collection, or both.
    pub exact: HashMap<(Option<Uuid>, Option<String>), u32>,
}

/// Which objects to delete or rename.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Which {
    /// The first so many that are still there.
    Count(u32),
    /// These.
    Ids(Vec<String>),
    /// The one at this place in the seeded order, counted from zero.
    Index(u32),
}

/// Differences from the seed in one collection of one tenant.
#[derive(Clone, Debug, Default)]
struct Overlay {
    count: Option<u32>,
    deleted: BTreeSet<u32>,
    renamed: BTreeMap<u32, (String, String)>,
}

/// Every tenant's objects.
#[derive(Debug)]
pub struct World {
    /// The paths and kinds of objects.
    pub catalog: Catalog,
    seed: u64,
    changes: Mutex<Changes>,
}

#[derive(Debug, Default)]
struct Changes {
    sizes: Sizes,
    overlays: HashMap<(Uuid, String), Arc<Overlay>>,
    version: u64,
}

/// Which collection of which tenant is meant.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The tenant.
    pub tenant: Uuid,
    /// The number of the collection in the catalog.
    pub found: usize,
    /// The concrete path, with the parent's id in it.
    pub path: &'a str,
}

/// One collection of one tenant as it is at this moment.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// Template of the object.
    pub collection: &'a Collection,
    /// Grows with every change of anything, so that old pages are never served from a cache.
    pub version: u64,
    key: u64,
    word: &'static str,
    parent: Option<&'a str>,
    count: u32,
    overlay: Arc<Overlay>,
}

impl World {
    /// Objects without any change.
    pub fn new(catalog: Catalog, seed: u64, sizes: Sizes) -> World {
        World { catalog, seed, changes: Mutex::new(Changes { sizes, ..Changes::default() }) }
    }

    /// The seed it was made from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// One collection of one tenant.
    pub fn view<'a>(&'a self, place: Place<'a>) -> View<'a> {
        let Place { tenant, found, path } = place;
        let collection = &self.catalog.collections()[found];
        let changes = self.changes.lock();
        let overlay = changes.overlays.get(&(tenant, path.to_owned())).cloned().unwrap_or_default();
        View {
            collection,
            version: changes.version,
            key: seed::collection_key(self.seed, tenant, path),
            word: seed::tenant_word(self.seed, tenant),
            parent: parent_id(&collection.path, path),
            count: overlay.count.unwrap_or_else(|| changes.sizes.of(tenant, collection, path)),
            overlay,
        }
    }

    /// Deletes objects and returns their ids.
    pub fn delete(&self, place: Place<'_>, which: &Which) -> Result<Vec<String>, String> {
        let view = self.view(place);
        let indexes = view.pick(which)?;
        self.change(place, |overlay| overlay.deleted.extend(&indexes));
        Ok(indexes.into_iter().map(|index| view.id(index)).collect())
    }

    /// Renames one object and returns its id; its modification time becomes now.
    pub fn rename(&self, place: Place<'_>, which: &Which, name: &str) -> Result<String, String> {
        let view = self.view(place);
        let indexes = view.pick(which)?;
        let [index] = indexes[..] else {
            return Err(format!("a rename takes one object, not {}", indexes.len()));
        };
        self.change(place, |overlay| {
            overlay.renamed.insert(index, (name.to_owned(), format!("{}Z", text::now_iso())));
        });
        Ok(view.id(index))
    }

    /// Appends objects and returns their ids.
    pub fn add(&self, place: Place<'_>, count: u32) -> Vec<String> {
        let view = self.view(place);
        let end = view.count.saturating_add(count);
        self.change(place, |overlay| overlay.count = Some(end));
        (view.count..end).map(|index| view.id(index)).collect()
    }

    /// Sets how many objects there are and forgets the deletions, renames and additions that this covers.
    pub fn resize(&self, tenant: Option<Uuid>, path: Option<&str>, count: u32) {
        let mut changes = self.changes.lock();
        changes.version += 1;
        changes.overlays.retain(|(of_tenant, of_path), _| {
            tenant.is_some_and(|tenant| tenant != *of_tenant) || path.is_some_and(|path| path != of_path)
        });
        match (tenant, path) {
            (None, None) => changes.sizes.default = count,
            _ => {
                changes.sizes.exact.insert((tenant, path.map(str::to_owned)), count);
            }
        }
    }

    fn change(&self, place: Place<'_>, apply: impl FnOnce(&mut Overlay)) {
        let mut changes = self.changes.lock();
        changes.version += 1;
        apply(Arc::make_mut(changes.overlays.entry((place.tenant, place.path.to_owned())).or_default()));
    }
}

impl Sizes {
    fn of(&self, tenant: Uuid, collection: &Collection, path: &str) -> u32 {
        let exact = |tenant: Option<Uuid>, path: &str| self.exact.get(&(tenant, Some(path.to_owned()))).copied();
        let kinds = u32::try_from(collection.templates.len()).unwrap_or(u32::MAX);
        let named = exact(Some(tenant), path)
            .or_else(|| exact(Some(tenant), &collection.path))
            .or_else(|| exact(None, path))
            .or_else(|| exact(None, &collection.path));
        let size =
            named.unwrap_or_else(|| match self.exact.get(&(Some(tenant), None)).copied().unwrap_or(self.default) {
                0 => 0,
                _ if collection.is_made_up => 1,
                many => many.max(kinds),
            });
        match collection.shape {
            _ if kinds == 0 => 0,
            Shape::Singleton => size.min(1),
            Shape::Collection | Shape::ChildCollection => size,
        }
    }
}

impl View<'_> {
    /// The places of the objects on the page that begins at `start`, and where the next page begins.
    pub fn page(&self, start: u32, top: usize) -> (Vec<u32>, Option<u32>) {
        let mut live = (start..self.count).filter(|index| !self.overlay.deleted.contains(index));
        let indexes: Vec<u32> = live.by_ref().take(top).collect();
        (indexes, live.next())
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.page(0, usize::MAX).0.len()
    }

    /// The id of the object at a place.
    pub fn id(&self, index: u32) -> String {
        let templates = &self.collection.templates;
        let template = &templates[index as usize % templates.len().max(1)];
        object_id(template.id_kind(), &self.instance(index))
    }

    /// The place of an object that is still there.
    pub fn find(&self, id: &str) -> Option<u32> {
        let is_here =
            |index: &u32| *index < self.count && !self.overlay.deleted.contains(index) && self.id(*index) == id;
        guid_in(id)
            .and_then(|(_, guid, _)| seed::index_of(self.key, guid))
            .filter(is_here)
            .or_else(|| id.parse().ok().filter(is_here))
            .or_else(|| self.literal_indexes().find(is_here))
    }

    /// Templates of the collection as one `$select` shows them.
    pub fn compile(&self, select: Option<&Select>) -> Vec<Compiled> {
        self.collection.templates.iter().map(|template| template.compile(select)).collect()
    }

    /// Writes the objects at these places, with commas between.
    pub fn write(&self, compiled: &[Compiled], indexes: &[u32], out: &mut Vec<u8>) {
        for (position, index) in indexes.iter().enumerate() {
            if position > 0 {
                out.push(b',');
            }
            compiled[*index as usize % compiled.len()].write(&self.instance(*index), out);
        }
    }

    /// The objects at these places as JSON values, for tests and for pages that a rule changes.
    pub fn values(&self, compiled: &[Compiled], indexes: &[u32]) -> Vec<Value> {
        let mut bytes = vec![b'['];
        self.write(compiled, indexes, &mut bytes);
        bytes.push(b']');
        serde_json::from_slice(&bytes).expect("pieces of serialised JSON make JSON again")
    }

    fn instance(&self, index: u32) -> Instance<'_> {
        Instance {
            key: self.key,
            index,
            templates: u32::try_from(self.collection.templates.len()).unwrap_or(u32::MAX),
            word: self.word,
            parent: self.parent,
            renamed: self.overlay.renamed.get(&index).map(|(name, when)| (name.as_str(), when.as_str())),
        }
    }

    fn pick(&self, which: &Which) -> Result<Vec<u32>, String> {
        match which {
            Which::Count(count) => Ok(self.page(0, *count as usize).0),
            Which::Index(index) if *index < self.count && !self.overlay.deleted.contains(index) => Ok(vec![*index]),
            Which::Index(index) => Err(format!("there is no object at {index}")),
            Which::Ids(ids) => {
                ids.iter().map(|id| self.find(id).ok_or_else(|| format!("there is no object {id}"))).collect()
            }
        }
    }

    /// Literal ids can only be searched for; such collections are small in life.
    fn literal_indexes(&self) -> impl Iterator<Item = u32> + '_ {
        let kinds = self.collection.templates.len().max(1);
        (0..self.count).filter(move |index| {
            let template = self.collection.templates.get(*index as usize % kinds);
            template.is_some_and(|template| matches!(template.id_kind(), IdKind::Literal(_)))
        })
    }
}
