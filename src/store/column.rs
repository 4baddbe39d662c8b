//! How the types of the service are kept in a column: as the text they print, read back by the parser they have.
//!
//! A type with `Display` and `FromStr` becomes a column type by one line in the list below.

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

/// Stores a type as its text. Reading text that the type does not parse is an error of that row, never a default.
macro_rules! text_column {
    ($($type:ty),+ $(,)?) => {$(
        impl sqlx::Type<sqlx::Sqlite> for $type {
            fn type_info() -> sqlx::sqlite::SqliteTypeInfo {
                <str as sqlx::Type<sqlx::Sqlite>>::type_info()
            }

            fn compatible(info: &sqlx::sqlite::SqliteTypeInfo) -> bool {
                <str as sqlx::Type<sqlx::Sqlite>>::compatible(info)
            }
        }

        impl<'q> sqlx::Encode<'q, sqlx::Sqlite> for $type {
            fn encode_by_ref(
                &self,
                arguments: &mut <sqlx::Sqlite as sqlx::Database>::ArgumentBuffer,
            ) -> Result<sqlx::encode::IsNull, sqlx::error::BoxDynError> {
                <String as sqlx::Encode<'q, sqlx::Sqlite>>::encode(self.to_string(), arguments)
            }
        }

        impl<'r> sqlx::Decode<'r, sqlx::Sqlite> for $type {
            fn decode(
                value: <sqlx::Sqlite as sqlx::Database>::ValueRef<'r>,
            ) -> Result<Self, sqlx::error::BoxDynError> {
                Ok(<&str as sqlx::Decode<'r, sqlx::Sqlite>>::decode(value)?.parse()?)
            }
        }
    )+};
}

text_column!(
    crate::clock::UtcTime,
    crate::id::VmId,
    crate::id::BackupId,
    crate::id::RepositoryId,
    crate::words::JobState,
    crate::words::JobResult,
    crate::words::DiskState,
    crate::words::FailureCode,
    crate::words::RequestedType,
    crate::words::BackupType,
    crate::words::TypeReason,
    crate::store::backups::NodeOutcome,
    crate::words::point::PointState,
    crate::words::point::Trust,
    crate::id::ExportId,
    crate::id::TaskId,
);

/// An unsigned number of a row. SQLite's integers are signed; a negative one is an error of that row.
pub(super) fn unsigned(row: &SqliteRow, column: &str) -> Result<u64, sqlx::Error> {
    let number: i64 = row.try_get(column)?;
    u64::try_from(number)
        .map_err(|source| sqlx::Error::ColumnDecode { index: column.to_owned(), source: source.into() })
}

/// An unsigned number for a column: above `i64::MAX` it has no place there.
pub(super) fn signed(number: u64) -> Result<i64, sqlx::Error> {
    i64::try_from(number).map_err(|source| sqlx::Error::Encode(source.into()))
}
