//! What every catalog has to do, asked of the trait alone.

use std::sync::Arc;

use iceberg::TableCreation;
use iceberg::spec::{
    NestedField, NullOrder, PrimitiveType, Schema, SortDirection, SortField, SortOrder, Transform, Type,
    UnboundPartitionSpec,
};

use crate::error::Kind;

use super::catalog::{Catalog, CommitError, LoadedTable, TableChange, TableName};

fn schema(columns: &[&str]) -> Schema {
    let field = |(i, name): (usize, &&str)| {
        Arc::new(NestedField::optional(i as i32 + 1, *name, Type::Primitive(PrimitiveType::Long)))
    };
    Schema::builder().with_fields(columns.iter().enumerate().map(field)).build().unwrap()
}

fn creation(columns: &[&str]) -> TableCreation {
    let spec =
        UnboundPartitionSpec::builder().add_partition_field(1, "x_bucket", Transform::Bucket(4)).unwrap().build();
    let order = SortField::builder()
        .source_id(1)
        .transform(Transform::Identity)
        .direction(SortDirection::Descending)
        .null_order(NullOrder::Last)
        .build();
    TableCreation::builder()
        .name("t".into())
        .schema(schema(columns))
        .partition_spec(spec)
        .sort_order(SortOrder::builder().with_order_id(1).with_sort_field(order).build_unbound().unwrap())
        .properties([("a".into(), "1".into())])
        .build()
}

fn new_schema(table: &TableName, base: &LoadedTable, columns: &[&str]) -> TableChange {
    TableChange::new(table, base, |builder| builder.add_current_schema(schema(columns))).unwrap()
}

fn property(table: &TableName, base: &LoadedTable, value: &str) -> TableChange {
    TableChange::new(table, base, |b| b.set_properties([("a".to_string(), value.to_string())].into())).unwrap()
}

fn columns(loaded: &LoadedTable) -> usize {
    loaded.metadata.current_schema().as_struct().fields().len()
}

/// `namespace` is to be a new one.
pub async fn conforms(catalog: &dyn Catalog, namespace: &str) {
    let [one, two] = ["one", "two"].map(|name| TableName { namespace: namespace.into(), name: name.into() });

    // Created once, whoever asks first; with the properties that were asked for.
    assert!(catalog.load(&one).await.unwrap().is_none(), "neither table nor namespace are there");
    let created = catalog.create(&one, creation(&["x"])).await.unwrap();
    let again = catalog.create(&one, creation(&["x", "y"])).await.unwrap();
    assert_eq!(again.metadata.uuid(), created.metadata.uuid());
    let partitioning = created.metadata.default_partition_spec().fields();
    assert_eq!((partitioning.len(), partitioning[0].transform), (1, Transform::Bucket(4)));
    let order = &created.metadata.default_sort_order().fields;
    assert_eq!((order.len(), order[0].direction), (1, SortDirection::Descending));
    assert_eq!((columns(&again), created.metadata.properties()["a"].as_str()), (1, "1"));
    let loaded = catalog.load(&one).await.unwrap().unwrap();
    assert_eq!(loaded.metadata, created.metadata);
    catalog.create(&two, creation(&["x"])).await.unwrap();
    let other = TableName { name: "three".into(), ..one.clone() };
    assert!(catalog.load(&other).await.unwrap().is_none(), "the namespace is there, the table is not");

    // A change is there afterwards; the same one from the old base is a conflict and does nothing.
    catalog.commit(&[new_schema(&one, &loaded, &["x", "y"])]).await.unwrap();
    let now = catalog.load(&one).await.unwrap().unwrap();
    assert_eq!(columns(&now), 2);
    assert_ne!(now.metadata_location, loaded.metadata_location);
    let late = catalog.commit(&[new_schema(&one, &loaded, &["x", "y", "z"])]).await.unwrap_err();
    assert!(matches!(late, CommitError::Conflict(_)), "{late:?}");
    assert_eq!(columns(&catalog.load(&one).await.unwrap().unwrap()), 2);

    // Of those who commit at the same time from one base, one has its way. A catalog may not know that of a request, as
    // long as it tells so.
    let now = catalog.load(&one).await.unwrap().unwrap();
    let racers = (0..4).map(|n| {
        let now = &now;
        let one = &one;
        async move { catalog.commit(&[new_schema(one, now, &["x", "y", &format!("r{n}")])]).await }
    });
    let outcomes = futures::future::join_all(racers).await;
    assert!(outcomes.iter().filter(|outcome| outcome.is_ok()).count() <= 1, "{outcomes:?}");
    let raced = catalog.load(&one).await.unwrap().unwrap();
    let won = raced.metadata.current_schema().as_struct().fields().last().unwrap().name.clone();
    for (n, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Ok(()) => assert_eq!(won, format!("r{n}")),
            Err(CommitError::Conflict(_)) => assert_ne!(won, format!("r{n}")),
            Err(CommitError::Failed(error)) => assert_ne!(error.kind(), Kind::Fatal, "{error}"),
        }
    }
    catalog.commit(&[new_schema(&one, &raced, &["x", "y", "after"])]).await.unwrap();

    // Properties too, where the catalog says so.
    let now = catalog.load(&one).await.unwrap().unwrap();
    catalog.commit(&[property(&one, &now, "2")]).await.unwrap();
    let late = catalog.commit(&[property(&one, &now, "1")]).await;
    assert_eq!(late.is_err(), catalog.guards_properties(), "{late:?}");

    // Several changes at once, where the catalog says so: one that is late holds back all of them.
    if catalog.commits_together() {
        let first = catalog.load(&one).await.unwrap().unwrap();
        let second = catalog.load(&two).await.unwrap().unwrap();
        let both = |columns: &[&str]| [new_schema(&one, &first, columns), new_schema(&two, &second, columns)];
        catalog.commit(&both(&["x", "v"])).await.unwrap();
        for table in [&one, &two] {
            assert!(catalog.load(table).await.unwrap().unwrap().metadata.current_schema().field_by_name("v").is_some());
        }
        let first = catalog.load(&one).await.unwrap().unwrap();
        let stale = [new_schema(&one, &first, &["x", "w"]), new_schema(&two, &second, &["x", "w"])];
        let late = catalog.commit(&stale).await.unwrap_err();
        assert!(matches!(late, CommitError::Conflict(_)), "{late:?}");
        for table in [&one, &two] {
            let schema = catalog.load(table).await.unwrap().unwrap();
            assert!(schema.metadata.current_schema().field_by_name("w").is_none(), "{table}");
        }
    }
}
