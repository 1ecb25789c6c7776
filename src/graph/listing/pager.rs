//! Pager: follows one path from next link to next link, and stops at lists that never end or lead to another host.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hash, RandomState};

use reqwest::Url;

use super::error::{ListError, Recovery};
use super::next_link;
use super::retry::{Decode, Fetched, Request};
use crate::domain::catalog::Collection;
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::policy_type::Shape;
use crate::graph::client::{GraphReader, QueryOptions};
use crate::graph::limits::family::Family;

/// Maximum number of consecutive empty pages; single ones are legal anywhere in a list.
const MAX_EMPTY_PAGES: u32 = 100;
/// Restarts of one list whose page token expired.
const MAX_RESTARTS: u32 = 2;

/// Set of seen ids, stored as 64-bit hashes to bound memory.
#[derive(Debug, Default)]
pub(in crate::graph) struct SeenIds {
    hasher: RandomState,
    hashes: HashSet<u64>,
}

impl SeenIds {
    /// Adds an id and returns `true` if it is new.
    pub(in crate::graph) fn insert(&mut self, id: impl Hash) -> bool {
        self.hashes.insert(self.hasher.hash_one(id))
    }
}

/// Position in the list under one path. It has no `Debug`: links contain names of the tenant.
pub(in crate::graph) struct Pager {
    version: String,
    path: String,
    /// Path for logs and for the memory of refused options; the path of a child list contains an id of the tenant.
    template: String,
    family: Family,
    select: String,
    top: Option<u32>,
    is_singleton: bool,
    next: Option<String>,
    /// Link of the last page.
    current: Option<Url>,
    links: SeenIds,
    pages: u32,
    empty_pages: u32,
    restarts: u32,
    /// Ids seen since a restart, which repeats the objects of the pages before it.
    seen_since_restart: Option<SeenIds>,
}

impl Pager {
    /// Pager of a collection, below one parent if `path` says so.
    pub(in crate::graph) fn new(collection: &Collection, path: &str) -> Self {
        let select: Vec<&str> = collection.select.iter().map(String::as_str).collect();
        Self {
            version: collection.api_version.clone(),
            path: path.to_owned(),
            template: collection.path.clone(),
            family: Family::of(collection),
            select: select.join(","),
            top: collection.top,
            is_singleton: collection.shape == Shape::Singleton,
            next: None,
            current: None,
            links: SeenIds::default(),
            pages: 0,
            empty_pages: 0,
            restarts: 0,
            seen_since_restart: None,
        }
    }

    /// Pager of the parents of a child collection; only their ids are requested.
    pub(in crate::graph) fn of_parents(collection: &Collection) -> Self {
        let path = collection.parent.clone().unwrap_or_default();
        Self { template: path.clone(), select: "id".to_owned(), top: None, ..Self::new(collection, &path) }
    }

    /// Fetches the next page; `None` after the last.
    pub(in crate::graph) async fn next(
        &mut self,
        reader: &GraphReader,
        decode: Decode<'_>,
    ) -> Result<Option<Fetched>, ListError> {
        if self.pages > 0 && self.next.is_none() {
            return Ok(None);
        }
        if self.pages >= reader.shared.max_pages {
            return Err(ErrorCode::GraphPagingLoop.into());
        }
        let fetched = match self.next.take() {
            Some(link) => match self.follow(&link, reader, decode).await {
                Err(error) if error.recovery == Recovery::Restart && self.restart() => {
                    self.first(reader, decode).await?
                }
                fetched => fetched?,
            },
            None => self.first(reader, decode).await?,
        };
        self.pages += 1;
        self.next.clone_from(&fetched.0.next);
        Ok(Some(fetched))
    }

    /// Follows a next link exactly as received.
    async fn follow(&mut self, link: &str, reader: &GraphReader, decode: Decode<'_>) -> Result<Fetched, ListError> {
        let url = next_link::validate(&reader.shared.base, self.current.as_ref(), link)?;
        self.remember(&url)?;
        self.current = Some(url.clone());
        let fetched = reader.get(self.request(&url, decode, true)).await;
        // The list existed a page ago: the failure proves neither that the path is unknown nor that the list has ended.
        fetched.map_err(|error| {
            let recovery = if error.recovery == Recovery::Restart { Recovery::Restart } else { Recovery::None };
            ListError { failure: not_unsupported(error.failure), recovery, ..error }
        })
    }

    /// Begins the list again, unless it was restarted too often.
    fn restart(&mut self) -> bool {
        self.restarts += 1;
        if self.restarts > MAX_RESTARTS {
            return false;
        }
        tracing::info!(path = self.template, restarts = self.restarts, "page token expired; restarting the list");
        self.links = SeenIds::default();
        self.seen_since_restart = Some(SeenIds::default());
        true
    }

    /// Fetches the first page. `$select` and `$top` are hints: if the request fails for good with them, it is sent once
    /// without `$select`, then once without both, and what succeeds is remembered for the list.
    async fn first(&mut self, reader: &GraphReader, decode: Decode<'_>) -> Result<Fetched, ListError> {
        let all = QueryOptions { select: !self.select.is_empty(), top: self.top.is_some() };
        let mut options = reader.accepted_options(&self.version, &self.template).and(all);
        let mut first_error: Option<ListError> = None;
        loop {
            let url = self.first_link(&reader.shared.base, options)?;
            self.remember(&url)?;
            self.current = Some(url.clone());
            match reader.get(self.request(&url, decode, first_error.is_none())).await {
                Ok(fetched) => {
                    if first_error.is_some() {
                        reader.options_refused(&self.version, &self.template, options);
                    }
                    return Ok(fetched);
                }
                // Without the options Graph says what is really wrong.
                Err(error) if error.recovery != Recovery::WithoutOptions => return Err(error),
                Err(error) => {
                    let error = first_error.unwrap_or(error);
                    match options.reduced() {
                        Some(reduced) => options = reduced,
                        None => return Err(error),
                    }
                    first_error = Some(error);
                }
            }
        }
    }

    fn request<'a>(&'a self, url: &'a Url, decode: Decode<'a>, retry_500: bool) -> Request<'a> {
        let (path, family, may_be_absent) = (self.template.as_str(), self.family, self.is_singleton);
        Request { url, path, family, decode, may_be_absent, retry_500 }
    }

    fn first_link(&self, base: &Url, options: QueryOptions) -> Result<Url, ListError> {
        let select = options.select.then(|| format!("$select={}", self.select));
        let top = self.top.filter(|_| options.top).map(|top| format!("$top={top}"));
        let options: Vec<String> = [select, top].into_iter().flatten().collect();
        let query = if options.is_empty() { String::new() } else { format!("?{}", options.join("&")) };
        let base = base.as_str().trim_end_matches('/');
        Url::parse(&format!("{base}/{}/{}{query}", self.version, self.path))
            .map_err(|_| ErrorCode::InternalError.into())
    }

    fn remember(&mut self, link: &Url) -> Result<(), ListError> {
        if self.links.insert(link.as_str()) { Ok(()) } else { Err(ErrorCode::GraphPagingLoop.into()) }
    }

    /// Returns `true` if an id counts as progress: `is_new` to the listing, or new since a restart.
    pub(in crate::graph) fn is_progress(&mut self, id: impl Hash, is_new: bool) -> bool {
        self.seen_since_restart.as_mut().map_or(is_new, |seen| seen.insert(id))
    }

    /// Checks that the list progresses, after a page with `ids` ids of which `new_ids` are new.
    pub(in crate::graph) fn check_progress(
        &mut self,
        page_is_empty: bool,
        ids: usize,
        new_ids: usize,
    ) -> Result<(), ListError> {
        self.empty_pages = if page_is_empty { self.empty_pages + 1 } else { 0 };
        let is_stuck = (ids > 0 && new_ids == 0) || self.empty_pages > MAX_EMPTY_PAGES;
        // The last page cannot loop, and may contain only objects that moved there while the list was read.
        if is_stuck && self.next.is_some() { Err(ErrorCode::GraphPagingLoop.into()) } else { Ok(()) }
    }
}

fn not_unsupported(failure: Failure) -> Failure {
    let code = if failure.code == ErrorCode::GraphUnsupported { ErrorCode::GraphBadRequest } else { failure.code };
    Failure { code, ..failure }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const BASE: &str = "https://graph.example";

    fn base() -> Url {
        Url::parse(BASE).unwrap()
    }

    fn pager(select: &[&str], top: Option<u32>) -> Pager {
        let collection = Collection {
            api_version: "beta".to_owned(),
            path: "deviceManagement/things".to_owned(),
            shape: Shape::Collection,
            parent: None,
            throttle: "intune-default".to_owned(),
            select: select.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>(),
            top,
            types: Vec::new(),
        };
        Pager::new(&collection, &collection.path)
    }

    #[test]
    fn the_first_link_lists_properties_sorted_and_unescaped() {
        let select = ["id", "displayName", "microsoft.graph.special/kind"];
        let link =
            |pager: &Pager, select, top| pager.first_link(&base(), QueryOptions { select, top }).unwrap().to_string();
        let path = "https://graph.example/beta/deviceManagement/things";
        let with_both = pager(&select, Some(100));
        let expected = format!("{path}?$select=displayName,id,microsoft.graph.special/kind&$top=100");
        assert_eq!(link(&with_both, true, true), expected);
        assert_eq!(link(&with_both, false, true), format!("{path}?$top=100"));
        assert_eq!(link(&pager(&[], None), false, true), path);
    }

    #[test]
    fn a_link_is_followed_once() {
        let mut pager = pager(&[], None);
        assert!(pager.remember(&base()).is_ok());
        assert_eq!(pager.remember(&base()).unwrap_err().failure.code, ErrorCode::GraphPagingLoop);
    }

    #[test]
    fn a_list_must_progress_until_its_last_page() {
        let mut pager = pager(&[], None);
        assert!(pager.check_progress(false, 2, 0).is_ok(), "the last page may repeat");
        pager.next = Some("https://graph.example/x".to_owned());
        assert!(pager.check_progress(false, 2, 1).is_ok());
        assert!(pager.check_progress(false, 0, 0).is_ok(), "objects without ids prove nothing");
        assert!(pager.check_progress(false, 2, 0).is_err());
        for _ in 0..MAX_EMPTY_PAGES {
            assert!(pager.check_progress(true, 0, 0).is_ok());
        }
        assert!(pager.check_progress(true, 0, 0).is_err());
    }
}
