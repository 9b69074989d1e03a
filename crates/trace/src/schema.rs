//! The columns of a trace file: names, types, and the check that a file has them.
//!
//! | column | type | meaning |
//! |---|---|---|
//! | `seq` | u32 | sequence (document), from 0 |
//! | `pos` | u32 | position in the sequence, from 0 |
//! | `token` | u32 | token id |
//! | `domain` | dictionary of utf8 | domain of the sequence |
//! | `layer` | u16 | decoder layer |
//! | `experts` | list of u16 | picked experts, highest weight first |
//! | `weights` | list of f32 | their weights |
//! | `logits` | list of f32, optional column | router logits, one per expert |
//! | `norms` | list of f32, optional column | output norm of each picked expert |
//! | `part` | dictionary of utf8, where the model has attention experts | whose experts these are: `feed_forward` or `attention` |
//!
//! One row per (seq, pos, layer, part). Rows of one layer are in the order in which the tokens were processed; rows of
//! different layers may be interleaved in chunks. No cell is null.

use crate::error::TraceError;
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use std::path::Path;
use std::sync::Arc;

/// Which of the optional columns a trace has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Columns {
    /// Record router logits: exact router entropy, and re-routing offline; `4 * n_experts` bytes a row.
    pub logits: bool,
    /// Record the output norm of each pick: what saliency-based plans need.
    pub norms: bool,
}

/// The required columns with their types in words, in file order.
pub(crate) const REQUIRED: [(&str, &str); 7] = [
    ("seq", "uint32"),
    ("pos", "uint32"),
    ("token", "uint32"),
    ("domain", "dictionary of utf8 (or utf8)"),
    ("layer", "uint16"),
    ("experts", "list of uint16"),
    ("weights", "list of float32"),
];
/// The optional columns with their types in words.
pub(crate) const OPTIONAL: [(&str, &str); 2] =
    [("logits", "list of float32"), ("norms", "list of float32")];

/// The column that says whose experts a row is about, with its type in words.
pub(crate) const PART: (&str, &str) = ("part", "dictionary of utf8 (or utf8)");

/// The item field of a list column.
pub(crate) fn item(data_type: DataType) -> FieldRef {
    Arc::new(Field::new("item", data_type, false))
}

/// The type of the `domain` column as written.
pub(crate) fn domain_type() -> DataType {
    DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))
}

/// The arrow schema of a trace with the given optional columns; with `parts`, of a model that has attention experts.
pub fn schema(columns: Columns, parts: bool) -> SchemaRef {
    let list = |data_type| DataType::List(item(data_type));
    let mut fields = vec![
        Field::new("seq", DataType::UInt32, false),
        Field::new("pos", DataType::UInt32, false),
        Field::new("token", DataType::UInt32, false),
        Field::new("domain", domain_type(), false),
        Field::new("layer", DataType::UInt16, false),
        Field::new("experts", list(DataType::UInt16), false),
        Field::new("weights", list(DataType::Float32), false),
    ];
    if columns.logits {
        fields.push(Field::new("logits", list(DataType::Float32), false));
    }
    if columns.norms {
        fields.push(Field::new("norms", list(DataType::Float32), false));
    }
    if parts {
        fields.push(Field::new(PART.0, domain_type(), false));
    }
    Arc::new(Schema::new(fields))
}

/// Checks the schema of a file, which with `parts` is of a model that has attention experts, and says which optional
/// columns it has. Further columns are left alone.
pub(crate) fn check(path: &Path, found: &Schema, parts: bool) -> Result<Columns, TraceError> {
    for (column, expected) in REQUIRED.into_iter().chain(parts.then_some(PART)) {
        let Ok(field) = found.field_with_name(column) else {
            let names: Vec<&str> = found
                .fields()
                .iter()
                .map(|field| field.name().as_str())
                .collect();
            return Err(TraceError::MissingColumn {
                path: path.to_path_buf(),
                column,
                expected,
                found: names.join(", "),
            });
        };
        check_type(path, column, expected, field)?;
    }
    for (column, expected) in OPTIONAL {
        if let Ok(field) = found.field_with_name(column) {
            check_type(path, column, expected, field)?;
        }
    }
    let has = |column| found.field_with_name(column).is_ok();
    Ok(Columns {
        logits: has("logits"),
        norms: has("norms"),
    })
}

fn check_type(
    path: &Path,
    column: &'static str,
    expected: &'static str,
    field: &Field,
) -> Result<(), TraceError> {
    let list_of = |item: DataType| matches!(field.data_type(), DataType::List(inner) if *inner.data_type() == item);
    let right = match column {
        "seq" | "pos" | "token" => *field.data_type() == DataType::UInt32,
        "layer" => *field.data_type() == DataType::UInt16,
        "experts" => list_of(DataType::UInt16),
        "domain" | "part" => match field.data_type() {
            DataType::Dictionary(_, values) => {
                matches!(**values, DataType::Utf8 | DataType::LargeUtf8)
            }
            other => matches!(
                other,
                DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
            ),
        },
        _ => list_of(DataType::Float32),
    };
    if right {
        return Ok(());
    }
    Err(TraceError::WrongType {
        path: path.to_path_buf(),
        column,
        found: field.data_type().to_string(),
        expected,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_written_schema_passes_its_own_check() {
        for logits in [false, true] {
            for norms in [false, true] {
                let columns = Columns { logits, norms };
                for parts in [false, true] {
                    let schema = schema(columns, parts);
                    assert_eq!(check(Path::new("t"), &schema, parts).unwrap(), columns);
                    assert_eq!(check(Path::new("t"), &schema, true).is_ok(), parts);
                }
            }
        }
    }

    #[test]
    fn a_missing_or_mistyped_column_is_named() {
        let all = Columns {
            logits: true,
            norms: true,
        };
        let full = schema(all, false);
        for (i, field) in full.fields().iter().enumerate() {
            let mut fields: Vec<Field> = full
                .fields()
                .iter()
                .map(|field| field.as_ref().clone())
                .collect();
            fields[i] = Field::new(field.name(), DataType::Int64, false);
            let error = check(Path::new("t"), &Schema::new(fields.clone()), false)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("`{}`", field.name())) && error.contains("Int64"),
                "{error}"
            );
            fields.remove(i);
            let result = check(Path::new("t"), &Schema::new(fields), false);
            assert_eq!(result.is_ok(), i >= REQUIRED.len());
        }
    }
}
