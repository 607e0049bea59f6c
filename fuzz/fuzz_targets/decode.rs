//! Any payload is decoded or refused: it never panics, hangs or grows memory beyond a constant times its size.
//! `fuzz/README.md` says how it is run.

#![no_main]

use std::sync::{Arc, LazyLock};

use floe::decode::Decoder;
use floe::schema::Schema;
use floe::source::{Chunk, Record};
use libfuzzer_sys::fuzz_target;

/// All column types; the second schema goes through the validator too.
static SCHEMAS: LazyLock<[Arc<Schema>; 2]> = LazyLock::new(|| {
    let all = include_str!("../schema.json");
    let slow = all.replacen('{', r#"{"dependentRequired":{"code":["note"]},"#, 1);
    [all, &slow].map(|text| Schema::parse_with_extra(text, Some("_extra")).expect("a schema"))
});

// Compiling them is not what is timed.
fuzz_target!(init: { LazyLock::force(&SCHEMAS); }, |payload: &[u8]| {
    let record = Record { offset: 0, timestamp_ms: 0, begin: 0, key_len: Record::NONE, value_len: payload.len() as u32 };
    let chunk = Chunk { data: payload.to_vec(), records: vec![record], ..Chunk::default() };
    for schema in SCHEMAS.iter() {
        let decoded = Decoder::new(schema.clone()).decode(&chunk);
        assert_eq!(decoded.records.len() + decoded.rejected.len(), 1);
    }
});
