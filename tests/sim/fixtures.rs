//! The collections that this Graph knows, from the fixture files and from nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::SimError;
use super::template::{IdKind, Template};

/// Source of fixtures.
#[derive(Clone, Debug)]
pub enum Fixtures {
    /// A folder of `<policyTypeKey>.json` files.
    Folder(PathBuf),
    /// Fixture files already in memory, for tests of the simulator itself.
    Inline(Vec<Value>),
}

impl Default for Fixtures {
    fn default() -> Self {
        Fixtures::Folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/graph"))
    }
}

/// Form of a path's response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// A list.
    Collection,
    /// One object.
    #[serde(alias = "singleton_complex")]
    Singleton,
    /// A list under every object of another list.
    ChildCollection,
}

#[derive(Deserialize)]
struct FixtureFile {
    collection: String,
    shape: Shape,
    objects: Vec<Map<String, Value>>,
}

/// One path of this Graph, with the objects that it cycles through.
#[derive(Debug)]
pub struct Collection {
    /// Version and path, such as `beta/deviceManagement/intents`; a child's has `{parent_id}` in it.
    pub path: String,
    /// Form of the response.
    pub shape: Shape,
    /// Templates of the objects.
    pub templates: Vec<Template>,
    /// The type that error messages name.
    pub entity_type: String,
    /// Made up here because only its children have a fixture: it has one object.
    pub is_made_up: bool,
    properties: BTreeMap<Option<String>, BTreeSet<String>>,
}

/// All paths of this Graph.
#[derive(Debug, Default)]
pub struct Catalog {
    collections: Vec<Collection>,
}

/// Target of a request path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// A list or a singleton: the number of its collection.
    List(usize),
    /// One object of a list.
    Object(usize, &'a str),
}

impl Collection {
    fn new(path: String, shape: Shape, objects: Vec<Map<String, Value>>, is_made_up: bool) -> Collection {
        let mut templates: Vec<Template> = objects.into_iter().map(Template::new).collect();
        let mut literals = BTreeSet::new();
        for template in &mut templates {
            if matches!(template.id_kind(), IdKind::Literal(text) if !literals.insert(text.clone())) {
                template.use_guid();
            }
        }
        let entity_type = format!("microsoft.graph.{}", singular(path.rsplit('/').next().unwrap_or(&path)));
        let properties = properties(&templates);
        Collection { path, shape, templates, entity_type, is_made_up, properties }
    }

    /// Returns `true` if any object (of that type, if one is named) has the property.
    pub fn has_property(&self, only_type: Option<&str>, name: &str) -> bool {
        let wanted = only_type.map(str::to_owned);
        self.properties.get(&wanted).is_some_and(|known| known.contains(name))
    }
}

impl Catalog {
    /// Reads the fixtures; several files about one path are merged.
    pub fn load(fixtures: &Fixtures) -> Result<Catalog, SimError> {
        let files = match fixtures {
            Fixtures::Folder(folder) => read_folder(folder)?,
            Fixtures::Inline(values) => values.iter().map(|value| ("inline".to_owned(), value.clone())).collect(),
        };
        let mut merged: BTreeMap<String, (Shape, Vec<Map<String, Value>>)> = BTreeMap::new();
        for (name, value) in files {
            let file: FixtureFile = serde_json::from_value(value).map_err(|error| format!("{name}: {error}"))?;
            let path = file.collection.trim_matches('/').to_owned();
            let (shape, objects) = merged.entry(path).or_insert_with(|| (file.shape, Vec::new()));
            if *shape != file.shape {
                return Err(format!("{name}: {} has another shape in another fixture", file.collection).into());
            }
            for object in file.objects {
                if !objects.contains(&object) {
                    objects.push(object);
                }
            }
        }
        let mut catalog = Catalog::default();
        for (path, (shape, objects)) in merged {
            catalog.collections.push(Collection::new(path, shape, objects, false));
        }
        catalog.add_missing_parents();
        Ok(catalog)
    }

    /// Every path, in order.
    pub fn collections(&self) -> &[Collection] {
        &self.collections
    }

    /// Resolves a request path (with its version, without a leading slash).
    pub fn resolve<'a>(&self, path: &'a str) -> Result<Target<'a>, &'a str> {
        if let Some(found) = self.find(path) {
            return Ok(Target::List(found));
        }
        if let Some((list, id)) = path.rsplit_once('/')
            && let Some(found) = self.find(list)
            && self.collections[found].shape != Shape::Singleton
        {
            return Ok(Target::Object(found, id));
        }
        Err(self.first_unknown_segment(path))
    }

    /// The number of the collection at exactly this path; the version may be left out.
    pub fn find_loosely(&self, path: &str) -> Option<(usize, String)> {
        let path = path.trim_matches('/');
        ["", "beta/", "v1.0/"].into_iter().find_map(|version| {
            let full = format!("{version}{path}");
            self.find(&full).map(|found| (found, full))
        })
    }

    fn find(&self, path: &str) -> Option<usize> {
        self.collections.iter().position(|collection| is_at(&collection.path, path))
    }

    fn first_unknown_segment<'a>(&self, path: &'a str) -> &'a str {
        let known = |length: usize| {
            self.collections.iter().any(|collection| {
                let mut pattern = collection.path.split('/');
                path.split('/').take(length).all(|segment| pattern.next().is_some_and(|part| fits(part, segment)))
            })
        };
        let unknown = (1..).find(|length| !known(*length)).unwrap_or(1);
        path.split('/').nth(unknown - 1).or_else(|| path.rsplit('/').next()).unwrap_or(path)
    }

    fn add_missing_parents(&mut self) {
        let parents: Vec<String> = self
            .collections
            .iter()
            .filter_map(|collection| collection.path.split_once("/{").map(|(parent, _)| parent.to_owned()))
            .collect();
        for path in parents {
            if self.find(&path).is_none() {
                let object = json!({"id": "00000000-0000-0000-0000-000000000000", "displayName": "Parent"});
                let object = object.as_object().cloned().unwrap_or_default();
                self.collections.push(Collection::new(path, Shape::Collection, vec![object], true));
            }
        }
    }
}

/// The parent's part of a child's concrete path.
pub fn parent_id<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    pattern.split('/').zip(path.split('/')).find_map(|(part, segment)| part.starts_with('{').then_some(segment))
}

fn is_at(pattern: &str, path: &str) -> bool {
    let mut segments = path.split('/');
    pattern.split('/').all(|part| segments.next().is_some_and(|segment| fits(part, segment)))
        && segments.next().is_none()
}

fn fits(part: &str, segment: &str) -> bool {
    part == segment || (part.starts_with('{') && !segment.is_empty())
}

fn read_folder(folder: &Path) -> Result<Vec<(String, Value)>, SimError> {
    let about = |error: std::io::Error| format!("fixtures in {}: {error}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(about)? {
        let path = entry.map_err(about)?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let bytes = std::fs::read(&path).map_err(about)?;
            let name = path.display().to_string();
            files.push((name.clone(), serde_json::from_slice(&bytes).map_err(|error| format!("{name}: {error}"))?));
        }
    }
    if files.is_empty() {
        return Err(format!("no fixture (*.json) in {}", folder.display()).into());
    }
    files.sort_by(|left, right| left.0.cmp(&right.0));
    Ok(files)
}

/// Per type, and under `None` for all types together, which properties its objects have.
fn properties(templates: &[Template]) -> BTreeMap<Option<String>, BTreeSet<String>> {
    let mut known: BTreeMap<Option<String>, BTreeSet<String>> = BTreeMap::new();
    for template in templates {
        let own_type = template.object().get("@odata.type").and_then(Value::as_str).map(str::to_owned);
        let names = template.object().keys().filter(|key| !key.contains('@')).cloned().chain(["id".to_owned()]);
        let names: Vec<String> = names.collect();
        known.entry(None).or_default().extend(names.iter().cloned());
        if own_type.is_some() {
            known.entry(own_type).or_default().extend(names);
        }
    }
    known
}

fn singular(plural: &str) -> String {
    match plural.strip_suffix("ies") {
        Some(stem) => format!("{stem}y"),
        None => plural.strip_suffix('s').unwrap_or(plural).to_owned(),
    }
}
