//! Each table property that README names acts on the files that are written.

use std::collections::HashMap;

use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::tests::*;
use super::*;

struct Written {
    files: Vec<DataFile>,
    metadata: Vec<ParquetMetaData>,
}

impl Written {
    fn first(&self) -> &ParquetMetaData {
        &self.metadata[0]
    }

    fn codec(&self) -> Compression {
        self.first().row_group(0).column(2).compression()
    }

    /// Pages of the doubles, in the first row group.
    fn pages(&self) -> usize {
        let file = std::fs::File::open(path_of(&self.files[0])).unwrap();
        let reader = SerializedFileReader::new(file).unwrap();
        let pages = reader.get_row_group(0).unwrap().get_column_page_reader(2).unwrap();
        pages.map(Result::unwrap).filter(|page| page.is_data_page()).count()
    }

    fn dictionary_of_devices(&self) -> u64 {
        let file = std::fs::File::open(path_of(&self.files[0])).unwrap();
        let reader = SerializedFileReader::new(file).unwrap();
        let pages = reader.get_row_group(0).unwrap().get_column_page_reader(0).unwrap();
        pages.map(Result::unwrap).filter(|page| page.is_dictionary_page()).map(|p| u64::from(p.num_values())).sum()
    }
}

fn path_of(file: &DataFile) -> &str {
    file.file_path().strip_prefix("file://").unwrap()
}

/// 60,000 rows in pieces of 1,000, under one property.
async fn written(property: &str, value: &str) -> Written {
    let fixture = Fixture::new();
    let mut spec = spec("t.events", &[]);
    spec.properties.insert(property.into(), value.into());
    let sink = fixture.open(&[spec]).await.unwrap();
    assert_eq!(metadata(&sink, 0).await.properties()[property], value);
    let files = write(&sink, 0, 1, (0..60).map(|i| events(i * 1_000, 1_000, 1_000)).collect()).await;
    let read =
        |file| SerializedFileReader::new(std::fs::File::open(path_of(file)).unwrap()).unwrap().metadata().clone();
    let metadata = files.iter().map(read).collect();
    let written = Written { files, metadata };
    assert_eq!(written.files.iter().map(|f| f.record_count()).sum::<u64>(), 60_000);
    // The folder goes with the fixture; what is read later has to be kept.
    std::mem::forget(fixture);
    written
}

#[tokio::test(flavor = "multi_thread")]
async fn write_properties_act() {
    let usual = written("comment", "none").await;
    assert!(matches!(usual.codec(), Compression::ZSTD(_)));
    assert_eq!((usual.files.len(), usual.first().num_row_groups(), usual.dictionary_of_devices()), (1, 1, 5));

    assert_eq!(written("write.parquet.compression-codec", "uncompressed").await.codec(), Compression::UNCOMPRESSED);
    // The level is not in the file, but its work is.
    let strong = written("write.parquet.compression-level", "19").await;
    assert!(strong.files[0].file_size_in_bytes() < usual.files[0].file_size_in_bytes());

    let groups = written("write.parquet.row-group-size-bytes", "65536").await.first().num_row_groups();
    assert!(groups > 1, "{groups} row groups");
    let pages = written("write.parquet.page-row-limit", "5000").await.pages();
    assert!(pages >= 12 && pages > usual.pages(), "{pages} pages");
    let pages = written("write.parquet.page-size-bytes", "1024").await.pages();
    assert!(pages > usual.pages(), "{pages} pages");
    // Too small for the names of five devices: written plainly after the first page.
    let dictionary = written("write.parquet.dict-size-bytes", "16").await;
    let size = |w: &Written| w.first().row_group(0).column(0).uncompressed_size();
    assert!(size(&dictionary) > 10 * size(&usual), "{} {}", size(&dictionary), size(&usual));

    let small = written("write.target-file-size-bytes", "100000").await;
    assert!(small.files.len() > 2, "{} files", small.files.len());
}

#[test]
fn properties_that_do_nothing_are_named() {
    let properties = |names: &[&str]| names.iter().map(|name| (name.to_string(), "x".to_string())).collect();
    let used = [
        "write.parquet.compression-codec",
        "write.parquet.row-group-size-bytes",
        "write.target-file-size-bytes",
        "history.expire.max-snapshot-age-ms",
        "write.data.path",
        "comment",
    ];
    assert!(files::without_effect(&properties(&used)).is_empty());
    let unused = [
        "write.metadata.metrics.default",
        "write.object-storage.enabled",
        "write.parquet.bloom-filter-enabled.column.device_id",
    ];
    assert_eq!(files::without_effect(&properties(&unused)), unused);
    let format = HashMap::from([("write.format.default".to_string(), "orc".to_string())]);
    assert_eq!(files::without_effect(&format), ["write.format.default"]);
    let format = HashMap::from([("write.format.default".to_string(), "parquet".to_string())]);
    assert!(files::without_effect(&format).is_empty());
}
