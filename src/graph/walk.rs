//! One path, followed from link to link, with the guards against lists that never end or lead elsewhere.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hash, RandomState};

use reqwest::Url;

use super::answer::{Refusal, Why};
use super::client::GraphReader;
use super::page::Parsed;
use super::request::{Read, Request};
use super::throttle::Family;
use crate::domain::catalog::Collection;
use crate::domain::failure::{ErrorCode, Failure};

/// Pages without an object are legal anywhere in a list, but not without end.
const MOST_EMPTY_PAGES: u32 = 100;

/// What was met before, at eight bytes each.
#[derive(Debug, Default)]
pub(super) struct Met {
    hasher: RandomState,
    hashes: HashSet<u64>,
}

impl Met {
    /// Whether it is met for the first time.
    pub(super) fn first_time(&mut self, what: impl Hash) -> bool {
        self.hashes.insert(self.hasher.hash_one(what))
    }
}

/// A path on its way from the first page to the last. It has no `Debug`: links hold names of the tenant.
pub(super) struct Walk {
    version: String,
    path: String,
    /// What logs and the memory of refused `$select`s call it; the path of a child has an id of the tenant in it.
    template: String,
    family: Family,
    select: String,
    top: Option<u32>,
    next: Option<String>,
    links: Met,
    pages: u32,
    empty_pages: u32,
}

impl Walk {
    /// The whole list of a collection, below one parent if `path` says so.
    pub(super) fn new(collection: &Collection, path: &str) -> Self {
        let select: Vec<&str> = collection.select.iter().map(String::as_str).collect();
        Self {
            version: collection.api_version.clone(),
            path: path.to_owned(),
            template: collection.path.clone(),
            family: Family::of(&collection.throttle),
            select: select.join(","),
            top: collection.top,
            next: None,
            links: Met::default(),
            pages: 0,
            empty_pages: 0,
        }
    }

    /// The ids of the parents of a child collection.
    pub(super) fn of_parents(collection: &Collection) -> Self {
        let path = collection.parent.clone().unwrap_or_default();
        Self { template: path.clone(), select: "id".to_owned(), top: None, ..Self::new(collection, &path) }
    }

    /// The next answer, or nothing after the last.
    pub(super) async fn step(&mut self, reader: &GraphReader, read: Read<'_>) -> Result<Option<Parsed>, Refusal> {
        if self.pages > 0 && self.next.is_none() {
            return Ok(None);
        }
        if self.pages >= reader.shared.max_pages {
            return Err(ErrorCode::GraphPagingLoop.into());
        }
        let parsed = match self.next.take() {
            Some(link) => self.follow(&link, reader, read).await?,
            None => self.first(reader, read).await?,
        };
        self.pages += 1;
        self.next.clone_from(&parsed.next);
        Ok(Some(parsed))
    }

    /// Follows a next link exactly as it was given.
    async fn follow(&mut self, link: &str, reader: &GraphReader, read: Read<'_>) -> Result<Parsed, Refusal> {
        let url = own_link(&reader.shared.base, link)?;
        self.remember(&url)?;
        let answer = reader.get(self.request(&url, read)).await;
        // The list was there a page ago: whatever is wrong, it is neither its path nor its end.
        answer.map_err(|refusal| Refusal { failure: not_unsupported(refusal.failure), why: Why::Final, ..refusal })
    }

    /// The first page; without `$select` if this Graph does not take it.
    async fn first(&mut self, reader: &GraphReader, read: Read<'_>) -> Result<Parsed, Refusal> {
        if !self.select.is_empty() && reader.is_selectable(&self.version, &self.template) {
            let url = self.first_link(&reader.shared.base, true)?;
            self.remember(&url)?;
            match reader.get(self.request(&url, read)).await {
                Err(Refusal { why: Why::Select, .. }) => reader.select_refused(&self.version, &self.template),
                answer => return answer,
            }
        }
        let url = self.first_link(&reader.shared.base, false)?;
        self.remember(&url)?;
        reader.get(self.request(&url, read)).await
    }

    fn request<'a>(&'a self, url: &'a Url, read: Read<'a>) -> Request<'a> {
        Request { url, path: &self.template, family: self.family, read }
    }

    fn first_link(&self, base: &Url, with_select: bool) -> Result<Url, Refusal> {
        let select = with_select.then(|| format!("$select={}", self.select));
        let top = self.top.map(|top| format!("$top={top}"));
        let options: Vec<String> = [select, top].into_iter().flatten().collect();
        let query = if options.is_empty() { String::new() } else { format!("?{}", options.join("&")) };
        let base = base.as_str().trim_end_matches('/');
        Url::parse(&format!("{base}/{}/{}{query}", self.version, self.path))
            .map_err(|_| ErrorCode::InternalError.into())
    }

    fn remember(&mut self, link: &Url) -> Result<(), Refusal> {
        if self.links.first_time(link.as_str()) { Ok(()) } else { Err(ErrorCode::GraphPagingLoop.into()) }
    }

    /// Judges whether the list gets on after a page that held `ids` ids, `new_ids` of them new.
    pub(super) fn check_progress(&mut self, page_is_empty: bool, ids: usize, new_ids: usize) -> Result<(), Refusal> {
        self.empty_pages = if page_is_empty { self.empty_pages + 1 } else { 0 };
        let stands_still = (ids > 0 && new_ids == 0) || self.empty_pages > MOST_EMPTY_PAGES;
        // At the end of a list nothing can loop, and its last page may well hold only what moved there meanwhile.
        if stands_still && self.next.is_some() { Err(ErrorCode::GraphPagingLoop.into()) } else { Ok(()) }
    }
}

/// Reads a link of Graph's and refuses one that would carry the token to another place. A URL keeps percent sequences
/// as they stand, so that what is sent is what was given.
fn own_link(base: &Url, link: &str) -> Result<Url, Refusal> {
    let url = Url::parse(link).map_err(|_| Refusal::from(ErrorCode::GraphBadResponse))?;
    let is_ours = url.scheme() == base.scheme()
        && url.host() == base.host()
        && url.port_or_known_default() == base.port_or_known_default()
        && url.username().is_empty()
        && url.password().is_none();
    if is_ours { Ok(url) } else { Err(ErrorCode::GraphForeignLink.into()) }
}

fn not_unsupported(failure: Failure) -> Failure {
    let code = if failure.code == ErrorCode::GraphUnsupported { ErrorCode::GraphBadRequest } else { failure.code };
    Failure { code, ..failure }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::policy_type::Shape;

    const BASE: &str = "https://graph.example";

    fn base() -> Url {
        Url::parse(BASE).unwrap()
    }

    fn walk(select: &[&str], top: Option<u32>) -> Walk {
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
        Walk::new(&collection, &collection.path)
    }

    #[test]
    fn a_double_encoded_link_survives_byte_for_byte() {
        let link = "https://graph.example/beta/deviceManagement/configurationPolicies?$top=25&$skiptoken=%255Bcosmosdb\
                    %255D%255B%257B%2522compositeToken%2522%253A%2522%2bRID%253a~x%2523RT%253a1%2522%257D%255D&a=%27b|c%27,d";
        let url = own_link(&base(), link).unwrap();
        assert_eq!(url.as_str(), link);
        // What hyper is given is made from this very text.
        let request = reqwest::Request::new(reqwest::Method::GET, url);
        assert_eq!(request.url().as_str(), link);
    }

    #[test]
    fn links_to_other_places_are_refused() {
        for link in [
            "https://evil.example/beta/x",
            "http://graph.example/beta/x",
            "https://graph.example:8443/beta/x",
            "https://graph.example.evil.example/beta/x",
            "https://graph.example@evil.example/beta/x",
            "https://user:password@graph.example/beta/x",
        ] {
            assert_eq!(own_link(&base(), link).unwrap_err().failure.code, ErrorCode::GraphForeignLink, "{link}");
        }
        assert!(own_link(&base(), "https://GRAPH.example:443/beta/x").is_ok());
        assert_eq!(own_link(&base(), "/beta/x?$skip=1").unwrap_err().failure.code, ErrorCode::GraphBadResponse);
    }

    #[test]
    fn the_first_link_names_properties_sorted_and_unescaped() {
        let select = ["id", "displayName", "microsoft.graph.special/kind"];
        let link = |walk: &Walk, with_select| walk.first_link(&base(), with_select).unwrap().to_string();
        let path = "https://graph.example/beta/deviceManagement/things";
        let walk_with_both = walk(&select, Some(100));
        let expected = format!("{path}?$select=displayName,id,microsoft.graph.special/kind&$top=100");
        assert_eq!(link(&walk_with_both, true), expected);
        assert_eq!(link(&walk_with_both, false), format!("{path}?$top=100"));
        assert_eq!(link(&walk(&[], None), false), path);
    }

    #[test]
    fn a_link_is_followed_once() {
        let mut walk = walk(&[], None);
        assert!(walk.remember(&base()).is_ok());
        assert_eq!(walk.remember(&base()).unwrap_err().failure.code, ErrorCode::GraphPagingLoop);
    }

    #[test]
    fn a_list_must_get_on_but_may_end_as_it_likes() {
        let mut walk = walk(&[], None);
        assert!(walk.check_progress(false, 2, 0).is_ok(), "the last page may repeat");
        walk.next = Some("https://graph.example/x".to_owned());
        assert!(walk.check_progress(false, 2, 1).is_ok());
        assert!(walk.check_progress(false, 0, 0).is_ok(), "objects without ids prove nothing");
        assert!(walk.check_progress(false, 2, 0).is_err());
        for _ in 0..MOST_EMPTY_PAGES {
            assert!(walk.check_progress(true, 0, 0).is_ok());
        }
        assert!(walk.check_progress(true, 0, 0).is_err());
    }
    const PIECES: [&str; 24] = [
        "https://",
        "http://",
        "graph.example",
        "evil.example",
        "GRAPH.EXAMPLE",
        "graph.example.",
        "@",
        ":",
        "443",
        "8443",
        "/",
        "\\",
        "?",
        "#",
        "%2f",
        "%40",
        "\t",
        "\u{3002}",
        ".",
        "user",
        "//",
        "beta",
        "[::1]",
        " ",
    ];

    proptest! {
        #[test]
        fn whatever_a_link_looks_like_the_token_goes_to_graph_alone(pieces in prop::collection::vec(prop::sample::select(&PIECES), 0..10)) {
            if let Ok(url) = own_link(&base(), &pieces.concat()) {
                prop_assert!(url.as_str().starts_with("https://graph.example/"), "{}", url);
                prop_assert_eq!((url.port(), url.username(), url.password()), (None, "", None));
            }
        }
    }
}
