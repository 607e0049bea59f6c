//! The transforms of partitions and sort orders, of whole columns.
//!
//! Owns: what differs from the `iceberg` crate's own (0.10.1), which does the rest. There an instant in the last second of a
//! day before 1970 belongs to the next day, truncating one of the smallest integers panics where overflow is checked, and
//! the bytes of a table's own Arrow schema cannot be truncated.
//! Invariant: values are those that Iceberg's Java library computes, from which other engines conclude which files to read.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int32Array, Int64Array, LargeBinaryArray};
use arrow::datatypes::{DataType, Date32Type, Int32Type, Int64Type, TimeUnit, TimestampMicrosecondType};
use iceberg::spec::Transform;
use iceberg::transform::{BoxedTransformFunction, create_transform_function};

const DAY_US: i64 = 86_400_000_000;

#[derive(Debug)]
pub struct TransformFunction {
    transform: Transform,
    of_the_crate: BoxedTransformFunction,
}

impl TransformFunction {
    pub fn new(transform: &Transform) -> iceberg::Result<TransformFunction> {
        Ok(TransformFunction { transform: *transform, of_the_crate: create_transform_function(transform)? })
    }

    pub fn transform(&self, input: ArrayRef) -> iceberg::Result<ArrayRef> {
        match (self.transform, input.data_type()) {
            (Transform::Day, DataType::Timestamp(TimeUnit::Microsecond, _)) => {
                // No timestamp of 64 bits is more days away than 32 bits hold.
                let day = |us: i64| us.div_euclid(DAY_US) as i32;
                Ok(Arc::new(input.as_primitive::<TimestampMicrosecondType>().unary::<_, Date32Type>(day)))
            }
            // Beyond the smallest value it goes on with the largest ones, as in Java.
            (Transform::Truncate(width), DataType::Int32) => {
                let width = i32::try_from(width).unwrap_or(i32::MAX);
                let truncated: Int32Array =
                    input.as_primitive::<Int32Type>().unary(|n| n.wrapping_sub(n.rem_euclid(width)));
                Ok(Arc::new(truncated))
            }
            (Transform::Truncate(width), DataType::Int64) => {
                let width = i64::from(width);
                let truncated: Int64Array =
                    input.as_primitive::<Int64Type>().unary(|n| n.wrapping_sub(n.rem_euclid(width)));
                Ok(Arc::new(truncated))
            }
            (Transform::Truncate(width), DataType::LargeBinary) => {
                let truncated =
                    input.as_binary::<i64>().iter().map(|bytes| Some(&bytes?[..bytes?.len().min(width as usize)]));
                Ok(Arc::new(LargeBinaryArray::from_iter(truncated)))
            }
            _ => self.of_the_crate.transform(input),
        }
    }

    pub fn preserves_order(&self) -> bool {
        self.transform.preserves_order()
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Array, Date32Array, TimestampMicrosecondArray};

    use super::*;

    fn transformed(transform: Transform, input: impl Array + 'static) -> ArrayRef {
        TransformFunction::new(&transform).unwrap().transform(Arc::new(input)).unwrap()
    }

    #[test]
    fn days_begin_at_midnight_before_1970_too() {
        let cases = [
            (0, 0),
            (-1, -1),
            (-500_000, -1),
            (-DAY_US, -1),
            (-DAY_US - 1, -2),
            // Half a second before midnight.
            (-DAY_US - 500_000, -2),
            (-DAY_US - 999_999, -2),
            (-DAY_US - 1_000_000, -2),
            (-62_135_596_800_000_000, -719_162),
            (253_402_300_799_999_999, 2_932_896),
        ];
        let instants = TimestampMicrosecondArray::from_iter(cases.iter().map(|(us, _)| Some(*us)).chain([None]));
        let days = Date32Array::from_iter(cases.iter().map(|(_, day)| Some(*day)).chain([None]));
        assert_eq!(transformed(Transform::Day, instants.clone()).as_ref(), &days as &dyn Array);
        assert_eq!(transformed(Transform::Day, instants.with_timezone("UTC")).as_ref(), &days as &dyn Array);
    }

    #[test]
    fn integers_are_truncated_downwards() {
        let ints =
            Int32Array::from(vec![Some(i32::MIN), Some(-11), Some(-10), Some(-1), Some(9), None, Some(i32::MAX)]);
        let expected = Int32Array::from(vec![
            Some(i32::MAX - 1),
            Some(-20),
            Some(-10),
            Some(-10),
            Some(0),
            None,
            Some(i32::MAX - 7),
        ]);
        assert_eq!(transformed(Transform::Truncate(10), ints).as_ref(), &expected as &dyn Array);
        let longs = Int64Array::from(vec![i64::MIN, -1, 0, i64::MAX]);
        let expected = Int64Array::from(vec![i64::MAX - 1, -10, 0, i64::MAX - 7]);
        assert_eq!(transformed(Transform::Truncate(10), longs).as_ref(), &expected as &dyn Array);
    }

    #[test]
    fn bytes_are_cut() {
        let bytes = LargeBinaryArray::from_iter([Some(&b""[..]), Some(b"a"), Some(b"abc"), None]);
        let expected = LargeBinaryArray::from_iter([Some(&b""[..]), Some(b"a"), Some(b"ab"), None]);
        assert_eq!(transformed(Transform::Truncate(2), bytes).as_ref(), &expected as &dyn Array);
    }
}
