//! The database at the start: what is refused, and what is kept.

use std::path::Path;

use blockyard::serve::{Service, StartError};
use blockyard::store::{SchemaError, migrations};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Row};

use crate::support::{self, TestService, vm_body};

async fn open(database: &Path) -> sqlx::SqliteConnection {
    SqliteConnectOptions::new().filename(database).connect().await.unwrap()
}

async fn start(folder: &Path) -> Result<Service, StartError> {
    Service::start(support::config(folder, "")).await
}

#[tokio::test]
async fn start_on_a_newer_or_changed_schema_is_refused_with_advice() {
    let rows = [
        (
            "INSERT INTO _sqlx_migrations VALUES (999, 'future', CURRENT_TIMESTAMP, TRUE, x'00', 1)",
            "schema version 999, this binary knows up to 2: start the version that wrote it",
        ),
        ("UPDATE _sqlx_migrations SET checksum = x'00' WHERE version = 1", "migration 1 ran with another text"),
        ("ALTER TABLE vms ADD COLUMN colour TEXT", "changed outside the service (vms): restore the database"),
        ("DROP INDEX vms_name", "changed outside the service (vms_name)"),
        ("CREATE TABLE extra (x TEXT)", "changed outside the service (extra)"),
        ("CREATE TRIGGER t AFTER INSERT ON vms BEGIN SELECT 1; END", "changed outside the service (t)"),
    ];
    for (change, advice) in rows {
        let folder = TestService::start().await.stop().await;
        let database = folder.path().join("state/blockyard.db");
        sqlx::raw_sql(change).execute(&mut open(&database).await).await.unwrap();
        let error = start(folder.path()).await.unwrap_err();
        assert!(error.to_string().contains(advice), "{change}: {error}");
        // A refusal changes nothing and holds nothing: the same again.
        assert_eq!(start(folder.path()).await.unwrap_err().to_string(), error.to_string());
    }
}

#[tokio::test]
async fn file_that_is_no_database_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("state")).unwrap();
    let database = folder.path().join("state/blockyard.db");
    let content = b"this is no database, whatever its name says, and it is longer than a header".repeat(20);
    std::fs::write(&database, &content).unwrap();
    let error = start(folder.path()).await.unwrap_err();
    assert!(matches!(error, StartError::Schema(SchemaError::Open { .. })), "{error:?}");
    assert_eq!(std::fs::read(&database).unwrap(), content);
}

#[tokio::test]
async fn database_is_opened_for_safety_before_speed() {
    let service = TestService::start().await;
    let mut connection = service.service.app().store.read().await.unwrap();
    for (pragma, value) in [("journal_mode", "wal"), ("synchronous", "2"), ("foreign_keys", "1")] {
        let sql = sqlx::AssertSqlSafe(format!("SELECT CAST({pragma} AS TEXT) FROM pragma_{pragma}"));
        let found: String = sqlx::query_scalar(sql).fetch_one(&mut *connection).await.unwrap();
        assert_eq!(found, value, "{pragma}");
    }
}

#[tokio::test]
async fn absent_texts_of_a_vm_are_stored_as_null() {
    let service = TestService::start().await;
    let mut body = vm_body("bare");
    body["uuid"] = "".into();
    body["credential"] = "".into();
    body["disks"] = serde_json::json!([{"device_key": 2000, "size_bytes": 512, "vmdk_path": "", "vmdk_uuid": ""}]);
    service.post("/api/v1/vms", &body).await.expect_status(201);
    let mut connection = service.service.app().store.read().await.unwrap();
    for (table, columns) in
        [("vms", "uuid, credential, dir, removed_at"), ("vm_disks", "unit_number, vmdk_uuid, vmdk_path")]
    {
        let sql = sqlx::AssertSqlSafe(format!("SELECT {columns} FROM {table}"));
        let row = sqlx::query(sql).fetch_one(&mut *connection).await.unwrap();
        for index in 0..row.len() {
            let value: Option<String> = row.try_get_unchecked(index).unwrap();
            assert_eq!(value, None, "column {index} of {columns}");
        }
    }
}

#[test]
fn every_migration_file_is_built_in_and_no_other() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let mut files: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    let built_in: Vec<String> =
        migrations().iter().map(|(version, name, _)| format!("{version:04}_{name}.sql")).collect();
    assert_eq!(files, built_in);
}
