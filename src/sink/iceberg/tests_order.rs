//! Files of a table with a sort order are sorted, and say so.

use arrow::array::{AsArray, RecordBatch, StringArray};
use arrow::datatypes::{Float64Type, Int64Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::tests::*;
use super::*;

/// The rows of a data file as it lies there, in its own order: battery and Kafka offset.
fn rows_of(file: &DataFile) -> Vec<(Option<f64>, i64)> {
    let path = file.file_path().strip_prefix("file://").unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(path).unwrap()).unwrap();
    let mut rows = Vec::new();
    for batch in reader.build().unwrap() {
        let batch = batch.unwrap();
        let battery = batch.column_by_name("battery").unwrap().as_primitive::<Float64Type>();
        let offset = batch.column_by_name("_kafka_offset").unwrap().as_primitive::<Int64Type>();
        rows.extend(battery.iter().zip(offset.iter().flatten()));
    }
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_in_the_order_that_the_table_declares() {
    let fixture = Fixture::new();
    let sort_by = vec!["battery desc".into(), "_kafka_offset".into()];
    let specs = [TableSpec { sort_by, ..spec("t.events", &["day(event_timestamp)"]) }];
    let sink = fixture.open(&specs).await.unwrap();
    // Three days, handed in in pieces that overlap in the order.
    let pieces = (0..6).map(|i| events(i * 50, 50, DAY_US / 100)).collect();
    let files = write(&sink, 0, 1, pieces).await;
    assert_eq!(files.len(), 3);
    for file in &files {
        assert_eq!(file.sort_order_id(), Some(1));
        let rows = rows_of(file);
        assert_eq!(rows.len(), 100);
        let mut sorted = rows.clone();
        // Descending, so nulls come last, among themselves in the order of their offsets.
        sorted.sort_by(|a, b| match (a.0, b.0) {
            (Some(x), Some(y)) => y.total_cmp(&x).then(a.1.cmp(&b.1)),
            (None, None) => a.1.cmp(&b.1),
            (x, y) => y.is_some().cmp(&x.is_some()),
        });
        assert_eq!(rows, sorted);
    }
    sink.commit(&batch_commit(&sink, 1, vec![files]).await).await.unwrap();

    // An existing table keeps its order, whatever the configuration says now.
    let unsorted = fixture.open(&[spec("t.events", &["day(event_timestamp)"])]).await.unwrap();
    let files = write(&unsorted, 0, 2, vec![events(300, 20, 1), events(0, 20, 1)]).await;
    assert_eq!(files[0].sort_order_id(), Some(1));
    assert!(rows_of(&files[0]).windows(2).all(|w| w[0].0 >= w[1].0));

    let plain = fixture.open(&[spec("t.plain", &[])]).await.unwrap();
    let files = write(&plain, 0, 1, vec![events(20, 20, 1), events(0, 20, 1)]).await;
    assert_eq!(files[0].sort_order_id(), None);
    assert_eq!(rows_of(&files[0])[0].1, 20, "as they came");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_rows_than_are_held_back_become_several_sorted_files() {
    let fixture = Fixture::new();
    let sort_by = vec!["truncate(8, device_id)".into(), "_kafka_offset desc".into()];
    let sink = fixture.open(&[TableSpec { sort_by, ..spec("t.events", &[]) }]).await.unwrap();
    let long = "x".repeat(100_000);
    let pieces = (0..20).map(|i| {
        let rows = events(i * 100, 100, 1);
        let mut columns = rows.columns().to_vec();
        columns[0] = Arc::new(StringArray::from_iter_values((0..100).map(|row| format!("device-{}{long}", row % 5))));
        RecordBatch::try_new(rows.schema(), columns).unwrap()
    });
    let files = write(&sink, 0, 1, pieces.collect()).await;
    assert!(files.len() > 1, "{}", files.len());
    assert_eq!(files.iter().map(DataFile::record_count).sum::<u64>(), 2_000);
    for file in &files {
        // Each file is sorted for itself.
        let order: Vec<_> = rows_of(file).iter().map(|(_, offset)| (offset % 5, -offset)).collect();
        assert!(order.is_sorted());
        assert_eq!((order[0].0, order[order.len() - 1].0), (0, 4));
    }
}
