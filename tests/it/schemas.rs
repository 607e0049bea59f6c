use crate::support::broker::{Broker, Rec};
use crate::support::floe::Pipeline;
use crate::support::turn;

const SCHEMA: &str = r##"{
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["id", "at", "items"],
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "at": {"type": "string", "format": "date-time"},
        "local": {"type": "string", "format": "local-date-time"},
        "time": {"type": "string", "format": "time"},
        "total": {"$ref": "#/$defs/money"},
        "items": {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["sku", "price"], "properties": {
                "sku": {"type": "string", "pattern": "^[A-Z]{3}$"}, "price": {"$ref": "#/$defs/money"}}}},
        "labels": {"type": "object", "additionalProperties": {"type": ["integer", "null"]}},
        "customer": {"type": "object", "properties": {"name": {"type": "string"}, "vip": {"type": "boolean"}}},
        "body": {"type": "string", "contentEncoding": "base64"},
        "ratio": {"type": "number", "format": "float"},
        "note": {"type": ["string", "object"]}
    },
    "dependentRequired": {"total": ["customer"]},
    "$defs": {"money": {"type": ["number", "string"], "format": "decimal", "x-precision": 12, "x-scale": 2}}
}"##;

const ID: &str = "123e4567-e89b-12d3-a456-426614174000";

#[test]
fn nested_types_are_read_by_others_as_they_were_written() {
    let _turn = turn();
    let broker = Broker::shared();
    let topic = "schemas_nested";
    broker.create_topic(topic, 1, &[]);
    let head = format!(r#""id":"{ID}","at":"2026-01-31T12:00:00.123456Z""#);
    let payloads = [
        format!(
            r#"{{{head},"items":[{{"sku":"ABC","price":19.9}},{{"price":"0.10","sku":"XYZ"}}],"labels":{{"a":1,"b":null}},
               "total":20.00,"customer":{{"vip":true}},"local":"2026-01-31T12:00:00.5","time":"14:00:00.000001+02:00",
               "body":"AP8=","ratio":0.1,"note":{{"x": 1}},"more":[1],"other":null}}"#
        ),
        format!(r#"{{{head},"items":[{{"sku":"ABC","price":9999999999.99}}]}}"#),
        format!(r#"{{{head},"items":[{{"sku":"ABC","price":1}},{{"sku":"abc","price":1}}]}}"#),
        format!(r#"{{{head},"items":[{{"sku":"ABC","price":1}}],"total":1}}"#),
    ];
    let record =
        |payload: &String| Rec { partition: Some(0), value: Some(payload.clone().into_bytes()), ..Rec::default() };
    broker.produce_records(topic, payloads.iter().map(record).collect::<Vec<_>>());
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    let file = pipeline.dir().join("orders.json");
    std::fs::write(&file, SCHEMA).unwrap();
    pipeline.set("schema.file", file.to_str().unwrap()).set("schema.extra_column", "_extra");
    pipeline.set("event_time.column", "at").remove("windows").remove("rows");
    pipeline.set("rows.table", "shop.orders").set("rows.partition_by", vec!["day(at)".to_owned()]);
    pipeline.set("dead_letters.table", "shop.dead_letters");
    pipeline.run();

    let tables = pipeline.tables();
    type Order = (Option<String>, Option<String>, Option<String>, String, Option<String>, Option<String>);
    let rows: Vec<Order> = tables.query(
        "select total::varchar, local::varchar, time::varchar, \
                list_transform(items, i -> i.sku || ' ' || i.price::varchar)::varchar, note, _extra \
         from {shop.orders} order by _kafka_offset",
    );
    let text = |text: &str| Some(text.to_owned());
    let first = (
        text("20.00"),
        text("2026-01-31 12:00:00.5"),
        text("12:00:00.000001"),
        "[ABC 19.90, XYZ 0.10]".to_owned(),
        text(r#"{"x": 1}"#),
        text(r#"{"more":[1],"other":null}"#),
    );
    assert_eq!(rows, [first, (None, None, None, "[ABC 9999999999.99]".to_owned(), None, None)]);
    let rest: (String, bool, String, i64, Option<i64>, i64) = tables
        .query(
            "select hex(body), customer.vip, ratio::varchar, labels['a'], labels['b'], cardinality(labels) \
             from {shop.orders} where _kafka_offset = 0",
        )
        .remove(0);
    assert_eq!(rest, ("00FF".into(), true, "0.1".into(), 1, None, 2));
    let table = tables.table("shop.orders");
    assert_eq!(table.rows, Some(2), "as PyIceberg reads it");
    let kind = |name: &str| table.columns.iter().find(|(n, ..)| n == name).map(|(_, kind, _)| kind.clone()).unwrap();
    assert_eq!((kind("total"), kind("local")), ("decimal(12, 2)".into(), "timestamp".into()));
    assert_eq!((kind("time"), kind("body")), ("time".into(), "binary".into()));

    let dead: Vec<(String, String)> = tables.query("select reason, path from {shop.dead_letters} order by \"offset\"");
    let expected = [("bad_format", "$.items[1].sku"), ("schema_violation", "$")];
    assert_eq!(dead, expected.map(|(reason, path)| (reason.to_owned(), path.to_owned())));
}
