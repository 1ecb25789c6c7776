//! `$select`, read as Graph reads it: refused whole for one unknown property.

use serde_json::{Map, Value};

use super::fixtures::Collection;

/// One checked `$select`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Select {
    fields: Vec<Field>,
    raw: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    /// Set by a type cast: the property is answered for objects of this type only.
    only_type: Option<String>,
    name: String,
}

/// Refusal of a `$select`, in Graph's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

impl Select {
    /// Reads a decoded `$select` value against what the objects of a collection really have.
    pub fn parse(raw: &str, collection: &Collection) -> Result<Select, Refusal> {
        let mut fields = Vec::new();
        for part in raw.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (only_type, name) = match part.rsplit_once('/') {
                Some((cast, name)) => (Some(format!("#{cast}")), name),
                None => (None, part),
            };
            if !collection.has_property(only_type.as_deref(), name) {
                let holder = only_type.as_deref().map(|cast| &cast[1..]);
                return Err(unknown_property(name, holder.unwrap_or(&collection.entity_type)));
            }
            fields.push(Field { only_type, name: name.to_owned() });
        }
        if fields.is_empty() {
            return Err(Refusal("Parsing OData Select and Expand failed: the list is empty.".into()));
        }
        Ok(Select { fields, raw: raw.to_owned() })
    }

    /// The text as it was asked for, for `@odata.context` and for caches.
    pub fn raw(&self) -> &str {
        &self.raw
    }

    /// Returns `true` if the property was selected.
    pub fn names(&self, property: &str) -> bool {
        self.fields.iter().any(|field| field.name == property)
    }

    /// The object as a list with this `$select` shows it: `id` and the type of derived objects always stay.
    pub fn apply(&self, object: &Map<String, Value>) -> Map<String, Value> {
        let own_type = object.get("@odata.type").and_then(Value::as_str);
        object
            .iter()
            .filter(|(key, _)| {
                let property = key.split_once("@odata.").map_or(key.as_str(), |(name, _)| name);
                key.as_str() == "id" || key.as_str() == "@odata.type" || self.wants(property, own_type)
            })
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    fn wants(&self, property: &str, own_type: Option<&str>) -> bool {
        self.fields.iter().any(|field| {
            field.name == property && (field.only_type.is_none() || field.only_type.as_deref() == own_type)
        })
    }
}

/// The refusal that Graph answers for a property which the type does not have.
pub fn unknown_property(name: &str, entity_type: &str) -> Refusal {
    Refusal(format!(
        "Parsing OData Select and Expand failed: Could not find a property named '{name}' on type '{entity_type}'."
    ))
}
