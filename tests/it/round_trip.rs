//! What is read back from Iceberg, by another engine, equals the document: to the last digit and microsecond. Random schemas,
//! random documents, members in any order, left out and null.

use serde_json::{Value, json};

use crate::support::broker::{Broker, Rec};
use crate::support::floe::Pipeline;
use crate::support::turn;

const SCHEMAS: u64 = 3;
const DOCUMENTS: u64 = 300;

/// Numbers that look random and are the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 ^ (self.0 >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 3
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn text(&mut self) -> String {
        let letters = ['a', 'Z', '0', ' ', '"', '\\', '\n', '\t', 'ü', '€', '😀', '\u{1}', '/', '{'];
        (0..self.below(30)).map(|_| letters[self.below(letters.len() as u64) as usize]).collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Text,
    Long,
    Int,
    Double,
    Float,
    Boolean,
    Instant,
    Local,
    Date,
    Time,
    Decimal,
    Binary,
    Struct,
    List,
    Map,
}

const KINDS: [Kind; 15] = [
    Kind::Text,
    Kind::Long,
    Kind::Int,
    Kind::Double,
    Kind::Float,
    Kind::Boolean,
    Kind::Instant,
    Kind::Local,
    Kind::Date,
    Kind::Time,
    Kind::Decimal,
    Kind::Binary,
    Kind::Struct,
    Kind::List,
    Kind::Map,
];

/// What is read back, in a form in which equal values are equal.
#[derive(Debug, PartialEq)]
enum Cell {
    Text(String),
    Bits(u64),
    Json(Value),
}

impl Kind {
    fn schema(self) -> Value {
        match self {
            Kind::Text => json!({"type": "string"}),
            Kind::Long => json!({"type": "integer"}),
            Kind::Int => json!({"type": "integer", "format": "int32"}),
            Kind::Double => json!({"type": "number"}),
            Kind::Float => json!({"type": "number", "format": "float"}),
            Kind::Boolean => json!({"type": "boolean"}),
            Kind::Instant => json!({"type": "string", "format": "date-time"}),
            Kind::Local => json!({"type": "string", "format": "local-date-time"}),
            Kind::Date => json!({"type": "string", "format": "date"}),
            Kind::Time => json!({"type": "string", "format": "time"}),
            Kind::Decimal => {
                json!({"type": ["number", "string"], "format": "decimal", "x-precision": 38, "x-scale": 9})
            }
            Kind::Binary => json!({"type": "string", "contentEncoding": "base64"}),
            Kind::Struct => json!({"type": "object", "properties": {
                "n": {"type": ["integer", "null"]}, "s": {"type": ["string", "null"]},
                "inner": {"type": ["object", "null"], "properties": {"x": {"type": ["number", "null"]}}}}}),
            Kind::List => json!({"type": "array", "items": {"type": ["integer", "null"]}}),
            Kind::Map => json!({"type": "object", "additionalProperties": {"type": ["string", "null"]}}),
        }
    }

    /// What DuckDB is asked for.
    fn sql(self, column: &str) -> String {
        match self {
            Kind::Instant | Kind::Local => format!("epoch_us({column})::varchar"),
            Kind::Binary => format!("hex({column})"),
            Kind::Struct | Kind::List | Kind::Map => format!("to_json({column})::varchar"),
            _ => format!("{column}::varchar"),
        }
    }

    fn read(self, text: String) -> Cell {
        match self {
            Kind::Double => Cell::Bits(text.parse::<f64>().unwrap().to_bits()),
            Kind::Float => Cell::Bits(text.parse::<f32>().unwrap().to_bits().into()),
            Kind::Time => Cell::Text(text.parse::<jiff::civil::Time>().unwrap().to_string()),
            Kind::Struct | Kind::List | Kind::Map => Cell::Json(serde_json::from_str(&text).unwrap()),
            _ => Cell::Text(text),
        }
    }

    /// A value as it stands in the document, and as it is to be read back.
    fn value(self, n: &mut Numbers) -> (String, Cell) {
        let quoted = |text: &str| Value::from(text).to_string();
        // 1900 to 2100
        let micros = n.below(6_311_433_600_000_000) as i64 - 2_208_988_800_000_000;
        match self {
            Kind::Text => {
                let text = n.text();
                (quoted(&text), Cell::Text(text))
            }
            Kind::Long => {
                let number = (n.next() << 3 ^ n.next()) as i64 >> n.below(64);
                (number.to_string(), Cell::Text(number.to_string()))
            }
            Kind::Int => {
                let number = n.next() as i32 >> n.below(32);
                (format!("{number}.0"), Cell::Text(number.to_string()))
            }
            Kind::Double => {
                let number = f64::from_bits(n.next() << 3 ^ n.next());
                let number = if number.is_finite() { number } else { 0.1 };
                (format!("{number:e}"), Cell::Bits(number.to_bits()))
            }
            Kind::Float => {
                let text = format!("{}.{}", n.below(100_000), n.below(1_000_000));
                (text.clone(), Cell::Bits(text.parse::<f32>().unwrap().to_bits().into()))
            }
            Kind::Boolean => {
                let text = (n.below(2) == 0).to_string();
                (text.clone(), Cell::Text(text))
            }
            Kind::Instant => {
                let hours = n.below(28) as i8 - 14;
                let zone = jiff::tz::Offset::from_hours(hours).unwrap();
                let local = zone.to_datetime(jiff::Timestamp::from_microsecond(micros).unwrap());
                let sign = if hours < 0 { '-' } else { '+' };
                // What is beyond microseconds is cut off.
                let text = format!("{local:.6}987{sign}{:02}:00", hours.abs());
                (quoted(&text), Cell::Text(micros.to_string()))
            }
            Kind::Local => {
                let local = jiff::tz::Offset::UTC.to_datetime(jiff::Timestamp::from_microsecond(micros).unwrap());
                (quoted(&local.to_string()), Cell::Text(micros.to_string()))
            }
            Kind::Date => {
                let utc = jiff::tz::Offset::UTC.to_datetime(jiff::Timestamp::from_microsecond(micros).unwrap());
                (quoted(&utc.date().to_string()), Cell::Text(utc.date().to_string()))
            }
            Kind::Time => {
                let utc = jiff::tz::Offset::UTC.to_datetime(jiff::Timestamp::from_microsecond(micros).unwrap());
                (quoted(&format!("{}Z", utc.time())), Cell::Text(utc.time().to_string()))
            }
            Kind::Decimal => {
                let sign = ["", "-"][n.below(2) as usize];
                let text =
                    format!("{sign}{}{:010}.{:09}", n.below(1 << 60) + 1, n.below(1 << 33), n.below(1_000_000_000));
                (if n.below(2) == 0 { quoted(&text) } else { text.clone() }, Cell::Text(text))
            }
            Kind::Binary => {
                let bytes: Vec<u8> = (0..n.below(4) * 3).map(|_| n.next() as u8).collect();
                (quoted(&base64(&bytes)), Cell::Text(bytes.iter().map(|b| format!("{b:02X}")).collect()))
            }
            Kind::Struct => {
                let inner = [json!(null), json!({"x": n.below(1000) as f64 + 0.1}), json!({"x": null})];
                let value = json!({"n": n.next() as i64, "s": n.text(), "inner": inner[n.below(3) as usize]});
                (value.to_string(), Cell::Json(value))
            }
            Kind::List => {
                let item = |n: &mut Numbers| if n.below(4) == 0 { json!(null) } else { json!(n.next() as i64) };
                let value: Value = (0..n.below(6)).map(|_| item(n)).collect();
                (value.to_string(), Cell::Json(value))
            }
            Kind::Map => {
                let entry = |n: &mut Numbers, i| (format!("{i}{}", n.text()), json!(n.text()));
                let value = Value::Object((0..n.below(5)).map(|i| entry(n, i)).collect());
                (value.to_string(), Cell::Json(value))
            }
        }
    }
}

/// Of bytes in groups of three.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |g: &[u8]| u32::from(g[0]) << 16 | u32::from(g[1]) << 8 | u32::from(g[2]);
    let digits = |g: u32| [18, 12, 6, 0].map(|shift| char::from(DIGITS[(g >> shift & 63) as usize]));
    bytes.chunks(3).flat_map(|g| digits(group(g))).collect()
}

#[test]
fn documents_are_read_back_as_they_were() {
    let _turn = turn();
    let broker = Broker::shared();
    for seed in 0..SCHEMAS {
        let n = &mut Numbers(seed + 1);
        // Every kind occurs in some schema, some of them twice.
        let first = (seed * 5) as usize;
        let mut kinds: Vec<Kind> = KINDS[first..first + 5].to_vec();
        kinds.extend((0..5).map(|_| KINDS[n.below(15) as usize]));
        let nullable: Vec<bool> = kinds.iter().map(|_| n.below(3) > 0).collect();
        let topic = format!("round_trip_{seed}");
        broker.create_topic(&topic, 1, &[]);

        let mut properties = json!({"at": {"type": "string", "format": "date-time"}});
        let mut required = vec!["at".to_owned()];
        for (i, (kind, nullable)) in kinds.iter().zip(&nullable).enumerate() {
            let mut schema = kind.schema();
            if *nullable {
                let mut types = match &schema["type"] {
                    Value::Array(types) => types.clone(),
                    one => vec![one.clone()],
                };
                types.push(json!("null"));
                schema["type"] = types.into();
            } else {
                required.push(format!("c{i}"));
            }
            properties[format!("c{i}")] = schema;
        }
        let schema = json!({"type": "object", "required": required, "properties": properties});

        let mut expected: Vec<Vec<Option<Cell>>> = Vec::new();
        let mut records = Vec::new();
        for _ in 0..DOCUMENTS {
            let mut members = vec![r#""at":"2026-01-01T00:00:00Z""#.to_owned()];
            let mut row = Vec::new();
            for (i, kind) in kinds.iter().enumerate() {
                match n.below(if nullable[i] { 8 } else { 6 }) {
                    6 => row.push(None),
                    7 => {
                        members.push(format!("\"c{i}\": null"));
                        row.push(None);
                    }
                    _ => {
                        let (text, cell) = kind.value(n);
                        members.push(format!("\"c{i}\": {text}"));
                        row.push(Some(cell));
                    }
                }
            }
            (0..members.len()).for_each(|i| members.swap(i, n.below(i as u64 + 1) as usize));
            let document = format!("{{{}}}", members.join(", "));
            records.push(Rec { partition: Some(0), value: Some(document.into_bytes()), ..Rec::default() });
            expected.push(row);
        }
        broker.produce_records(&topic, records);

        let mut pipeline = Pipeline::new(&broker.bootstrap, &topic);
        let file = pipeline.dir().join("schema.json");
        std::fs::write(&file, schema.to_string()).unwrap();
        pipeline.set("schema.file", file.to_str().unwrap()).set("event_time.column", "at");
        pipeline.remove("windows").remove("rows").set("rows.table", "trip.rows");
        pipeline.set("dead_letters.table", "trip.dead_letters");
        pipeline.run();

        let tables = pipeline.tables();
        let refused: Vec<(i64, String, String)> =
            tables.query("select \"offset\", path, message from {trip.dead_letters} limit 3");
        assert_eq!(refused, [], "of {schema}");
        let columns: Vec<String> = kinds.iter().enumerate().map(|(i, kind)| kind.sql(&format!("c{i}"))).collect();
        let rows: Vec<Vec<Option<String>>> =
            tables.query(&format!("select {} from {{trip.rows}} order by _kafka_offset", columns.join(", ")));
        assert_eq!(rows.len(), expected.len());
        for (offset, (found, expected)) in rows.into_iter().zip(expected).enumerate() {
            for (i, (found, expected)) in found.into_iter().zip(expected).enumerate() {
                let found = found.map(|text| kinds[i].read(text));
                assert_eq!(found, expected, "schema {seed}, offset {offset}, column {i}: {:?}", kinds[i]);
            }
        }
    }
}
