//! What becomes of an existing table whose columns are not the pipeline's: nothing, an additive change, or a refusal.
//!
//! Pure. A change comes with the first commit of a process that needs it: columns and the first rows that fill them appear
//! together, and a process that gets to no commit leaves the table as it was. Data files carry field ids, so what they will
//! be is settled when the tables are opened, and the commit happens only if the table's columns still are what they were then.
//! It touches the schema alone. Whatever an older schema wrote still fits afterwards. Invariant: field ids come after the
//! table's last one and are never used again; partitioning, sort order, identifier fields and everything that others have
//! added stay.

use std::fmt;
use std::sync::Arc;

use iceberg::arrow::type_to_arrow_type;
use iceberg::spec::{
    ListType, MapType, NestedField, NestedFieldRef, PrimitiveType, Schema, SchemaRef, StructType, TableMetadata, Type,
};

use super::catalog::{LoadedTable, TableChange, TableName};

/// What it takes to make a table fit its pipeline.
#[derive(Debug)]
pub enum Evolution {
    /// Every row of the pipeline fits as it is.
    Same,
    Evolve {
        changes: Vec<Change>,
        schema: Box<Schema>,
    },
    /// Both schemas side by side, one line a column.
    Refuse(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Add {
        column: String,
        kind: String,
    },
    Widen {
        column: String,
        from: String,
        to: String,
    },
    /// A required column may be null from now on.
    Relax {
        column: String,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Add { column, kind } => write!(f, "add {column} {kind}"),
            Change::Widen { column, from, to } => write!(f, "widen {column} from {from} to {to}"),
            Change::Relax { column } => write!(f, "let {column} be null"),
        }
    }
}

/// `add a string, widen b from int to long`.
pub fn listed(changes: &[Change]) -> String {
    changes.iter().map(Change::to_string).collect::<Vec<_>>().join(", ")
}

/// Columns are matched by name. `last_column_id` is the highest id that the table has ever given.
pub fn plan(table: &Schema, last_column_id: i32, wanted: &Schema) -> Evolution {
    let mut comparison = Comparison {
        identifiers: table.identifier_field_ids().collect(),
        last_column_id,
        in_map_key: false,
        changes: Vec::new(),
        lines: Vec::new(),
    };
    let fields = comparison.columns("", table.as_struct(), wanted.as_struct());
    if comparison.lines.iter().any(|line| line.mark == REFUSED) {
        return Evolution::Refuse(side_by_side(&comparison.lines));
    }
    if comparison.changes.is_empty() {
        return Evolution::Same;
    }
    let identifiers = comparison.identifiers;
    match Schema::builder().with_fields(fields).with_identifier_field_ids(identifiers).build() {
        Ok(schema) => Evolution::Evolve { changes: comparison.changes, schema: Box::new(schema) },
        Err(e) => Evolution::Refuse(format!("{}\n{e}", side_by_side(&comparison.lines))),
    }
}

/// The schema, and nothing else, is new.
pub fn apply(table: &TableName, loaded: &LoadedTable, schema: Schema) -> iceberg::Result<TableChange> {
    TableChange::new(table, loaded, |builder| builder.add_current_schema(schema))
}

/// The table's own schema that is the same as this one, whatever its number; none: it has yet to get it.
pub fn same_schema<'a>(metadata: &'a TableMetadata, schema: &Schema) -> Option<&'a SchemaRef> {
    let is_it = |known: &&SchemaRef| {
        known.as_struct() == schema.as_struct() && known.identifier_field_ids().eq(schema.identifier_field_ids())
    };
    let numbered_alike = metadata.schema_by_id(schema.schema_id()).filter(is_it);
    numbered_alike.or_else(|| metadata.schemas_iter().find(is_it))
}

/// A name of which another one differs in case only: most engines could tell neither from the other.
pub fn ambiguous_name(columns: &StructType) -> Option<(String, String)> {
    let fields = columns.fields();
    for (i, field) in fields.iter().enumerate() {
        if let Some(twin) = fields[..i].iter().find(|f| same_but_for_case(&f.name, &field.name)) {
            return Some((twin.name.clone(), field.name.clone()));
        }
        let mut inner = &field.field_type;
        let nested = loop {
            match inner.as_ref() {
                Type::Struct(columns) => break Some(columns),
                Type::List(list) => inner = &list.element_field.field_type,
                Type::Map(map) => inner = &map.value_field.field_type,
                Type::Primitive(_) => break None,
            }
        };
        if let Some((a, b)) = nested.and_then(ambiguous_name) {
            return Some((format!("{}.{a}", field.name), format!("{}.{b}", field.name)));
        }
    }
    None
}

fn same_but_for_case(a: &str, b: &str) -> bool {
    a != b && a.to_lowercase() == b.to_lowercase()
}

const SAME: char = ' ';
const ADDED: char = '+';
const CHANGED: char = '~';
const REFUSED: char = '!';

/// One column of the two schemas.
struct Line {
    mark: char,
    column: String,
    table: String,
    pipeline: String,
    note: String,
}

struct Comparison {
    identifiers: Vec<i32>,
    last_column_id: i32,
    in_map_key: bool,
    changes: Vec<Change>,
    lines: Vec<Line>,
}

impl Comparison {
    /// The table's columns with the wanted ones worked in; new ones come last.
    fn columns(&mut self, prefix: &str, found: &StructType, wanted: &StructType) -> Vec<NestedFieldRef> {
        let mut columns = Vec::with_capacity(found.fields().len());
        for field in found.fields() {
            let name = format!("{prefix}{}", field.name);
            columns.push(match wanted.field_by_name(&field.name) {
                Some(wanted) => self.column(&name, field, wanted),
                None => {
                    let (mark, note) = if field.required {
                        (REFUSED, "the table requires it: keep it in the schema, or make it optional in the table")
                    } else {
                        (SAME, "not in the pipeline: written as null")
                    };
                    self.line(mark, &name, Some(field), None, note);
                    field.clone()
                }
            });
        }
        for (i, field) in wanted.fields().iter().enumerate() {
            let name = format!("{prefix}{}", field.name);
            let twin = |others: &[NestedFieldRef]| {
                others.iter().find(|f| same_but_for_case(&f.name, &field.name)).map(|f| f.name.clone())
            };
            let known = found.field_by_name(&field.name).is_some();
            if let Some(twin) = twin(&wanted.fields()[..i]) {
                self.line(
                    REFUSED,
                    &name,
                    None,
                    Some(field),
                    &format!("differs from {twin:?} in case only: rename one"),
                );
            } else if known {
                continue;
            } else if let Some(twin) = twin(found.fields()) {
                self.line(REFUSED, &name, None, Some(field), &format!("the table's column is {twin:?}: name it so"));
            } else if self.in_map_key {
                self.line(REFUSED, &name, None, Some(field), "the key of a map cannot change");
            } else if field.required {
                let note = "a new column has to be optional, since older rows have none: not required, or null allowed";
                self.line(REFUSED, &name, None, Some(field), note);
            } else {
                self.line(ADDED, &name, None, Some(field), "will be added; null in older rows");
                self.changes.push(Change::Add { column: name, kind: kind(&field.field_type) });
                columns.push(self.with_new_ids(field));
            }
        }
        columns
    }

    fn column(&mut self, name: &str, found: &NestedFieldRef, wanted: &NestedFieldRef) -> NestedFieldRef {
        let mut column = found.as_ref().clone();
        let at = self.lines.len();
        let mut mark = SAME;
        let mut notes: Vec<&str> = Vec::new();
        if found.required && !wanted.required {
            if self.identifiers.contains(&found.id) {
                mark = REFUSED;
                notes.push("an identifier column of the table cannot be null: require it in the schema");
            } else if self.in_map_key {
                mark = REFUSED;
                notes.push("the key of a map cannot change");
            } else {
                mark = CHANGED;
                notes.push("may be null from now on");
                column.required = false;
                self.changes.push(Change::Relax { column: name.to_string() });
            }
        }
        match (found.field_type.as_ref(), wanted.field_type.as_ref()) {
            (Type::Struct(found), Type::Struct(wanted)) => {
                let columns = self.columns(&format!("{name}."), found, wanted);
                column.field_type = Box::new(Type::Struct(StructType::new(columns)));
            }
            (Type::List(found), Type::List(wanted)) => {
                let element = self.column(&format!("{name}.element"), &found.element_field, &wanted.element_field);
                column.field_type = Box::new(Type::List(ListType::new(element)));
            }
            (Type::Map(found), Type::Map(wanted)) => {
                let outer = std::mem::replace(&mut self.in_map_key, true);
                let key = self.column(&format!("{name}.key"), &found.key_field, &wanted.key_field);
                self.in_map_key = outer;
                let value = self.column(&format!("{name}.value"), &found.value_field, &wanted.value_field);
                column.field_type = Box::new(Type::Map(MapType::new(key, value)));
            }
            (found, wanted) if fits(found, wanted) => {}
            (found, wanted) if widens(found, wanted) && !self.in_map_key => {
                mark = if mark == REFUSED { REFUSED } else { CHANGED };
                notes.push("will be widened");
                column.field_type = Box::new(wanted.clone());
                let (from, to) = (kind(found), kind(wanted));
                self.changes.push(Change::Widen { column: name.to_string(), from, to });
            }
            _ => {
                mark = REFUSED;
                notes.push("the types do not fit: give the column its old type, or another name");
            }
        }
        self.line(mark, name, Some(found), Some(wanted), &notes.join("; "));
        // A column comes before its children.
        self.lines[at..].rotate_right(1);
        Arc::new(column)
    }

    fn line(
        &mut self,
        mark: char,
        column: &str,
        table: Option<&NestedFieldRef>,
        pipeline: Option<&NestedFieldRef>,
        note: &str,
    ) {
        // Where both sides are nested alike, the children have lines of their own.
        let side = |side: Option<&NestedFieldRef>, other: Option<&NestedFieldRef>| match (side, other) {
            (None, _) => "-".to_string(),
            (Some(field), Some(other)) => match (field.field_type.as_ref(), other.field_type.as_ref()) {
                (Type::Struct(_), Type::Struct(_)) => format!("struct{}", required(field)),
                (Type::List(_), Type::List(_)) => format!("list{}", required(field)),
                (Type::Map(_), Type::Map(_)) => format!("map{}", required(field)),
                (of, _) => format!("{}{}", kind(of), required(field)),
            },
            (Some(field), None) => format!("{}{}", kind(&field.field_type), required(field)),
        };
        self.lines.push(Line {
            mark,
            column: column.to_string(),
            table: side(table, pipeline),
            pipeline: side(pipeline, table),
            note: note.to_string(),
        });
    }

    fn with_new_ids(&mut self, field: &NestedFieldRef) -> NestedFieldRef {
        let mut new = field.as_ref().clone();
        self.last_column_id += 1;
        new.id = self.last_column_id;
        new.field_type = Box::new(match field.field_type.as_ref() {
            Type::Primitive(primitive) => Type::Primitive(primitive.clone()),
            Type::Struct(columns) => {
                Type::Struct(StructType::new(columns.fields().iter().map(|f| self.with_new_ids(f)).collect()))
            }
            Type::List(list) => Type::List(ListType::new(self.with_new_ids(&list.element_field))),
            Type::Map(map) => {
                let key = self.with_new_ids(&map.key_field);
                Type::Map(MapType::new(key, self.with_new_ids(&map.value_field)))
            }
        });
        Arc::new(new)
    }
}

/// Values of `wanted` go into a column of `found` as they are or by a cast without loss.
fn fits(found: &Type, wanted: &Type) -> bool {
    // What comes as the same Arrow type is written in the same way, such as a UUID and 16 bytes.
    let same = || matches!((type_to_arrow_type(found), type_to_arrow_type(wanted)), (Ok(a), Ok(b)) if a == b);
    found == wanted || widens(wanted, found) || same()
}

/// The promotions that Iceberg allows: no older value changes.
fn widens(from: &Type, to: &Type) -> bool {
    use PrimitiveType::{Decimal, Double, Float, Int, Long};
    match (from, to) {
        (Type::Primitive(Int), Type::Primitive(Long)) | (Type::Primitive(Float), Type::Primitive(Double)) => true,
        (
            Type::Primitive(Decimal { precision: from, scale }),
            Type::Primitive(Decimal { precision: to, scale: same }),
        ) => from < to && scale == same,
        _ => false,
    }
}

fn required(field: &NestedField) -> &'static str {
    if field.required { " required" } else { "" }
}

/// `long`, `list<struct<name string required, value binary>>`.
fn kind(of: &Type) -> String {
    match of {
        Type::Primitive(primitive) => primitive.to_string(),
        Type::Struct(columns) => {
            let column = |f: &NestedFieldRef| format!("{} {}{}", f.name, kind(&f.field_type), required(f));
            format!("struct<{}>", columns.fields().iter().map(column).collect::<Vec<_>>().join(", "))
        }
        Type::List(list) => format!("list<{}>", kind(&list.element_field.field_type)),
        Type::Map(map) => format!("map<{}, {}>", kind(&map.key_field.field_type), kind(&map.value_field.field_type)),
    }
}

fn side_by_side(lines: &[Line]) -> String {
    let head = Line {
        mark: SAME,
        column: "column".into(),
        table: "in the table".into(),
        pipeline: "in the pipeline".into(),
        note: String::new(),
    };
    let width = |of: fn(&Line) -> &str| lines.iter().chain([&head]).map(|l| of(l).chars().count()).max().unwrap_or(0);
    let (a, b, c) = (width(|l| &l.column), width(|l| &l.table), width(|l| &l.pipeline));
    let row = |l: &Line| {
        let text = format!("  {} {:a$}  {:b$}  {:c$}  {}", l.mark, l.column, l.table, l.pipeline, l.note);
        text.trim_end().to_string()
    };
    [&head].into_iter().chain(lines).map(row).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(fields: Vec<NestedField>) -> Schema {
        Schema::builder().with_fields(fields.into_iter().map(Arc::new)).build().unwrap()
    }

    fn primitive(p: PrimitiveType) -> Type {
        Type::Primitive(p)
    }

    fn optional(id: i32, name: &str, p: PrimitiveType) -> NestedField {
        NestedField::optional(id, name, primitive(p))
    }

    fn required(id: i32, name: &str, p: PrimitiveType) -> NestedField {
        NestedField::required(id, name, primitive(p))
    }

    fn decimal(precision: u32, scale: u32) -> PrimitiveType {
        PrimitiveType::Decimal { precision, scale }
    }

    fn structure(id: i32, name: &str, fields: Vec<NestedField>) -> NestedField {
        NestedField::optional(id, name, Type::Struct(StructType::new(fields.into_iter().map(Arc::new).collect())))
    }

    fn list(id: i32, name: &str, element: NestedField) -> NestedField {
        NestedField::optional(id, name, Type::List(ListType::new(Arc::new(element))))
    }

    fn map(id: i32, name: &str, key: NestedField, value: NestedField) -> NestedField {
        NestedField::optional(id, name, Type::Map(MapType::new(Arc::new(key), Arc::new(value))))
    }

    fn evolved(table: Vec<NestedField>, last: i32, wanted: Vec<NestedField>) -> (String, Schema) {
        match plan(&schema(table), last, &schema(wanted)) {
            Evolution::Evolve { changes, schema } => (listed(&changes), *schema),
            other => panic!("{other:?}"),
        }
    }

    fn refused(table: Vec<NestedField>, wanted: Vec<NestedField>) -> String {
        match plan(&schema(table), 100, &schema(wanted)) {
            Evolution::Refuse(diff) => diff,
            other => panic!("{other:?}"),
        }
    }

    fn same(table: Vec<NestedField>, wanted: Vec<NestedField>) {
        let plan = plan(&schema(table), 100, &schema(wanted));
        assert!(matches!(plan, Evolution::Same), "{plan:?}");
    }

    use PrimitiveType::{Binary, Boolean, Date, Double, Float, Int, Long, String as Text, Timestamp, Timestamptz};

    #[test]
    fn what_fits_is_left_alone() {
        same(vec![required(1, "a", Long)], vec![required(1, "a", Long)]);
        same(vec![optional(1, "a", Long)], vec![required(1, "a", Int)]);
        same(vec![optional(1, "a", Double)], vec![optional(7, "a", Float)]);
        same(vec![optional(1, "a", decimal(12, 2))], vec![optional(1, "a", decimal(10, 2))]);
        // Others' columns, in whatever order.
        same(vec![optional(5, "theirs", Text), optional(2, "a", Int)], vec![optional(1, "a", Int)]);
        same(vec![optional(1, "id", PrimitiveType::Uuid)], vec![optional(1, "id", PrimitiveType::Fixed(16))]);
    }

    #[test]
    fn columns_are_added_with_new_ids_and_types_widen_in_place() {
        let table = vec![required(2, "id", Int), optional(4, "x", Float), optional(5, "d", decimal(9, 2))];
        let wanted = vec![
            optional(1, "id", Long),
            optional(2, "fw", Text),
            optional(3, "x", Double),
            optional(4, "d", decimal(12, 2)),
        ];
        let (changes, schema) = evolved(table, 9, wanted);
        assert_eq!(
            changes,
            "let id be null, widen id from int to long, widen x from float to double, \
             widen d from decimal(9, 2) to decimal(12, 2), add fw string"
        );
        let columns: Vec<_> = schema.as_struct().fields().iter().map(|f| (f.id, f.name.as_str(), f.required)).collect();
        assert_eq!(columns, [(2, "id", false), (4, "x", false), (5, "d", false), (10, "fw", false)]);
        assert_eq!(*schema.field_by_id(2).unwrap().field_type, primitive(Long));
    }

    #[test]
    fn nested_columns_evolve_too() {
        let table = vec![
            structure(1, "place", vec![required(2, "lat", Float)]),
            list(3, "tags", structure(4, "element", vec![optional(5, "k", Text)])),
            map(6, "m", required(7, "key", Text), optional(8, "value", Int)),
        ];
        let wanted = vec![
            structure(1, "place", vec![required(2, "lat", Double), structure(3, "grid", vec![required(4, "n", Int)])]),
            list(5, "tags", structure(6, "element", vec![optional(7, "k", Text), optional(8, "v", Text)])),
            map(9, "m", required(10, "key", Text), optional(11, "value", Long)),
            map(12, "n", required(13, "key", Text), optional(14, "value", Int)),
        ];
        let (changes, schema) = evolved(table, 8, wanted);
        assert_eq!(
            changes,
            "widen place.lat from float to double, add place.grid struct<n int required>, add tags.element.v string, \
             widen m.value from int to long, add n map<string, int>"
        );
        let id = |name: &str| schema.field_id_by_name(name).unwrap();
        assert_eq!(
            ["place.grid", "place.grid.n", "tags.element.v", "n", "n.key", "n.value"].map(id),
            [9, 10, 11, 12, 13, 14]
        );
        assert_eq!(["place", "place.lat", "tags.element.k", "m.value"].map(id), [1, 2, 5, 8]);
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let one = |from, to| refused(vec![optional(1, "a", from)], vec![optional(1, "a", to)]);
        for (from, to) in [
            (Int, Text),
            (Long, Double),
            (Int, Double),
            (Text, Binary),
            (Date, Timestamp),
            (Timestamp, Timestamptz),
            (Boolean, Int),
            (decimal(10, 2), decimal(12, 3)),
        ] {
            assert!(one(from, to).contains("! a"));
        }
        assert!(refused(vec![], vec![required(1, "new", Int)]).contains("has to be optional"));
        assert!(refused(vec![required(1, "theirs", Int)], vec![]).contains("the table requires it"));
        assert!(refused(vec![optional(1, "Name", Text)], vec![optional(1, "name", Text)]).contains("is \"Name\""));
        let twins = vec![optional(1, "name", Text), optional(2, "NAME", Text)];
        assert!(refused(vec![optional(1, "name", Text)], twins).contains("in case only"));
        let nested = structure(1, "a", vec![optional(2, "b", Int)]);
        assert!(refused(vec![nested.clone()], vec![optional(1, "a", Text)]).contains("struct<b int>"));
        assert!(refused(vec![list(1, "a", optional(2, "element", Int))], vec![nested]).contains("! a"));
        let keyed = |key| map(1, "m", required(2, "key", key), optional(3, "value", Int));
        assert!(refused(vec![keyed(Int)], vec![keyed(Long)]).contains("! m.key"));
    }

    #[test]
    fn an_identifier_column_stays_required() {
        let fields = vec![Arc::new(required(1, "id", Long))];
        let table = Schema::builder().with_fields(fields).with_identifier_field_ids([1]).build().unwrap();
        let plan = plan(&table, 1, &schema(vec![optional(1, "id", Long)]));
        assert!(matches!(&plan, Evolution::Refuse(diff) if diff.contains("identifier column")), "{plan:?}");
    }

    #[test]
    fn a_refusal_shows_both_schemas_column_by_column() {
        let table =
            vec![required(1, "id", Text), optional(2, "n", Int), structure(3, "s", vec![optional(4, "x", Int)])];
        let wanted = vec![
            required(1, "id", Text),
            optional(2, "n", Boolean),
            structure(3, "s", vec![optional(4, "x", Int)]),
            optional(5, "fw", Text),
        ];
        assert_eq!(
            refused(table, wanted),
            "    column  in the table     in the pipeline
    id      string required  string required
  ! n       int              boolean          the types do not fit: give the column its old type, or another name
    s       struct           struct
    s.x     int              int
  + fw      -                string           will be added; null in older rows"
        );
    }

    #[test]
    fn names_that_differ_in_case_only_are_found() {
        assert_eq!(ambiguous_name(schema(vec![optional(1, "a", Int), optional(2, "b", Int)]).as_struct()), None);
        let top = schema(vec![optional(1, "a", Int), optional(2, "A", Int)]);
        assert_eq!(ambiguous_name(top.as_struct()), Some(("a".into(), "A".into())));
        let element = structure(2, "element", vec![optional(3, "x", Int), optional(4, "X", Int)]);
        let nested = schema(vec![list(1, "l", element)]);
        assert_eq!(ambiguous_name(nested.as_struct()), Some(("l.x".into(), "l.X".into())));
    }
}
