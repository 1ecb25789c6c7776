//! Template of one fixture object, split into pieces so that generating an object only copies text.

use serde_json::{Map, Value};
use uuid::Uuid;

use super::seed;
use super::select::Select;

const ID_MARK: &str = "~~sim:id~~";
const NAME_MARK: &str = "~~sim:name~~";
const MODIFIED_MARK: &str = "~~sim:modified~~";

/// Properties that may hold a name; the first of these that an object has is its name. The simulator must not ask our
/// contracts for it.
const NAME_PROPERTIES: [&str; 13] = [
    "displayName",
    "name",
    "profileName",
    "tokenName",
    "organizationName",
    "ownerOrganizationName",
    "fileName",
    "subjectName",
    "connectorServerName",
    "connectorName",
    "serviceDisplayName",
    "instanceUrl",
    "topicIdentifier",
];

/// Form of the ids of a template's objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdKind {
    /// A GUID, perhaps with text around it (`T_<guid>`, `<guid>_DefaultLimit`); a new one for every object.
    Guid { prefix: String, guid: String, suffix: String },
    /// Small numbers, as scope tags have: the index itself, the same in every tenant.
    Number,
    /// Any other text (`c1`, `en-US`): kept for the first object, counted after it.
    Literal(String),
    /// The objects have no id at all.
    Absent,
}

/// A fixture object and what is known about it.
#[derive(Clone, Debug)]
pub struct Template {
    object: Map<String, Value>,
    id_kind: IdKind,
    name_property: Option<&'static str>,
}

/// A template as one `$select` shows it, ready to be written out for any index.
#[derive(Debug)]
pub struct Compiled {
    pieces: Vec<Piece>,
    id_kind: IdKind,
}

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Id,
    Name(String),
    Modified(String),
}

/// Values that make one object out of a template.
#[derive(Clone, Copy, Debug)]
pub struct Instance<'a> {
    /// See [`seed::collection_key`].
    pub key: u64,
    /// Position in the collection.
    pub index: u32,
    /// Number of templates that the collection cycles through.
    pub templates: u32,
    /// The company word in its name.
    pub word: &'a str,
    /// The concrete parent, in a child collection: ids are made unique by it.
    pub parent: Option<&'a str>,
    /// A rename: the new name and when it happened.
    pub renamed: Option<(&'a str, &'a str)>,
}

impl Template {
    /// Looks at a fixture object: its kind of id and its name.
    pub fn new(object: Map<String, Value>) -> Template {
        let id_kind = object.get("id").and_then(Value::as_str).map_or(IdKind::Absent, id_kind);
        let name_property = NAME_PROPERTIES
            .into_iter()
            .find(|name| object.get(*name).is_some_and(Value::is_string))
            // An object without a name stays without one.
            .filter(|name| object.get(*name) != Some(&Value::from("")));
        Template { object, id_kind, name_property }
    }

    /// The fixture object itself.
    pub fn object(&self) -> &Map<String, Value> {
        &self.object
    }

    /// Form of the ids.
    pub fn id_kind(&self) -> &IdKind {
        &self.id_kind
    }

    /// Gives up a literal id that another template of the collection uses too.
    pub fn use_guid(&mut self) {
        self.id_kind = IdKind::Guid { prefix: String::new(), guid: Uuid::nil().to_string(), suffix: String::new() };
    }

    /// The template as this `$select` shows it.
    pub fn compile(&self, select: Option<&Select>) -> Compiled {
        let mut object = self.object.clone();
        let base_name = self.name_property.map(|name| escaped(&mark(&mut object, name, NAME_MARK)));
        let modified = object
            .get("lastModifiedDateTime")
            .is_some_and(Value::is_string)
            .then(|| escaped(&mark(&mut object, "lastModifiedDateTime", MODIFIED_MARK)));
        if self.id_kind != IdKind::Absent {
            mark(&mut object, "id", ID_MARK);
        }
        let shown = select.map_or_else(|| object.clone(), |select| select.apply(&object));
        let mut text = Value::Object(shown).to_string();
        if let IdKind::Guid { prefix, guid, suffix } = &self.id_kind
            && guid.as_str() != Uuid::nil().to_string()
        {
            // Links inside an object name the object itself.
            text = text.replace(&format!("{prefix}{guid}{suffix}"), ID_MARK);
        }
        let pieces = cut(&text, base_name.as_deref().unwrap_or(""), modified.as_deref().unwrap_or(""));
        Compiled { pieces, id_kind: self.id_kind.clone() }
    }
}

impl Compiled {
    /// Writes the JSON of one object.
    pub fn write(&self, instance: &Instance<'_>, out: &mut Vec<u8>) {
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.extend_from_slice(text.as_bytes()),
                Piece::Id => out.extend_from_slice(object_id(&self.id_kind, instance).as_bytes()),
                Piece::Modified(original) => {
                    let text = instance.renamed.map_or(original.as_str(), |(_, when)| when);
                    out.extend_from_slice(text.as_bytes());
                }
                Piece::Name(base) => match instance.renamed {
                    Some((name, _)) => out.extend_from_slice(escaped(name).as_bytes()),
                    None => {
                        let name = format!("{base} {:04} {}", instance.index + 1, instance.word);
                        out.extend_from_slice(name.as_bytes());
                    }
                },
            }
        }
    }
}

/// The id of one object.
pub fn object_id(kind: &IdKind, instance: &Instance<'_>) -> String {
    match kind {
        IdKind::Guid { prefix, suffix, .. } => {
            let guid = seed::guid(instance.key, instance.index);
            format!("{prefix}{guid}{suffix}")
        }
        IdKind::Number => under_parent(instance.index.to_string(), instance),
        IdKind::Literal(text) => match instance.index / instance.templates.max(1) {
            0 => under_parent(text.clone(), instance),
            cycle => under_parent(format!("{text}-{cycle}"), instance),
        },
        IdKind::Absent => String::new(),
    }
}

/// Makes an id that every parent's children would share one of its own.
fn under_parent(id: String, instance: &Instance<'_>) -> String {
    match instance.parent {
        Some(parent) => format!("{id}-{:08x}", seed::fold_text(0, parent) as u32),
        None => id,
    }
}

/// Finds the GUID inside an id, if there is one.
pub fn guid_in(id: &str) -> Option<(&str, Uuid, &str)> {
    let starts = 0..id.len().saturating_sub(35);
    starts.into_iter().find_map(|start| {
        let guid = Uuid::try_parse(id.get(start..start + 36)?).ok()?;
        Some((&id[..start], guid, &id[start + 36..]))
    })
}

fn id_kind(id: &str) -> IdKind {
    if let Some((prefix, _, suffix)) = guid_in(id) {
        let guid = id[prefix.len()..id.len() - suffix.len()].to_owned();
        return IdKind::Guid { prefix: prefix.to_owned(), guid, suffix: suffix.to_owned() };
    }
    if !id.is_empty() && id.len() < 10 && id.bytes().all(|byte| byte.is_ascii_digit()) {
        return IdKind::Number;
    }
    IdKind::Literal(id.to_owned())
}

/// Puts a mark in the place of a property and gives back the text that was there.
fn mark(object: &mut Map<String, Value>, property: &str, mark: &str) -> String {
    match object.insert(property.to_owned(), Value::from(mark)) {
        Some(Value::String(text)) => text,
        _ => String::new(),
    }
}

/// Text escaped for a JSON string.
fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

fn cut(text: &str, base_name: &str, modified: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some((at, found)) =
        [ID_MARK, NAME_MARK, MODIFIED_MARK].into_iter().filter_map(|mark| rest.find(mark).map(|at| (at, mark))).min()
    {
        pieces.push(Piece::Text(rest[..at].to_owned()));
        pieces.push(match found {
            ID_MARK => Piece::Id,
            NAME_MARK => Piece::Name(base_name.to_owned()),
            _ => Piece::Modified(modified.to_owned()),
        });
        rest = &rest[at + found.len()..];
    }
    pieces.push(Piece::Text(rest.to_owned()));
    pieces
}
