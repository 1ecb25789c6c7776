//! Cache of generated pages.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::paging::Position;
use super::reply::Reply;
use super::select::Select;
use super::template::Compiled;

/// Size at which the cache is emptied, to bound the memory of the simulator.
const MOST_BYTES: usize = 256 << 20;
const MOST_COMPILED: usize = 2_000;

/// Everything that a page depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageKey {
    /// See [`super::world::View::version`].
    pub version: u64,
    /// Tenant of the page.
    pub tenant: Uuid,
    /// The concrete path.
    pub path: String,
    /// The host in its links.
    pub host: String,
    /// The raw query without the token.
    pub query: String,
    /// Which page.
    pub position: Position,
    /// `true` if the page is kept compressed too.
    pub takes_gzip: bool,
}

type CompiledKey = (String, Option<String>);

/// The caches.
#[derive(Debug, Default)]
pub struct Pages {
    made: Mutex<Made>,
    compiled: Mutex<HashMap<CompiledKey, Arc<Vec<Compiled>>>>,
}

#[derive(Debug, Default)]
struct Made {
    version: u64,
    bytes: usize,
    pages: HashMap<PageKey, (Reply, u64)>,
}

impl Pages {
    /// A page that was made before, with its number of objects.
    pub fn get(&self, key: &PageKey) -> Option<(Reply, u64)> {
        self.made.lock().pages.get(key).cloned()
    }

    /// Keeps a page.
    pub fn put(&self, key: PageKey, reply: Reply, objects: u64) {
        let size = reply.body.len() + reply.gzip.as_ref().map_or(0, |gzip| gzip.len()) + key.query.len() + 512;
        let mut made = self.made.lock();
        // Pages of an older version are never requested again.
        if made.bytes + size > MOST_BYTES || key.version > made.version {
            *made = Made { version: key.version, ..Made::default() };
        }
        made.bytes += size;
        made.pages.insert(key, (reply, objects));
    }

    /// The templates of a collection as one `$select` shows them.
    pub fn compiled(
        &self,
        path: &str,
        select: Option<&Select>,
        make: impl FnOnce() -> Vec<Compiled>,
    ) -> Arc<Vec<Compiled>> {
        let key = (path.to_owned(), select.map(|select| select.raw().to_owned()));
        let mut compiled = self.compiled.lock();
        if compiled.len() > MOST_COMPILED {
            compiled.clear();
        }
        Arc::clone(compiled.entry(key).or_insert_with(|| Arc::new(make())))
    }
}
