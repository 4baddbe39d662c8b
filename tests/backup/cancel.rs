//! Cancelling: in every state, twice, and with everything given back.

use blockyard::node::fake::{CompleteFault, Faults, PausePoint, StartFault};
use serde_json::json;

use crate::rig::{Plan, Rig, id_of};

#[tokio::test(flavor = "multi_thread")]
async fn cancel_in_every_state_ends_cancelled_within_its_limit_and_frees_everything() {
    let paused = |point| Faults { pause: Some(point), ..Faults::default() };
    let cases = [
        ("starting", Faults { start: StartFault::Hang { launch: false }, ..Faults::default() }),
        ("starting", paused(PausePoint::BeforeConnect(0))),
        ("transferring", paused(PausePoint::Connected(0))),
        ("transferring", paused(PausePoint::AfterBytes(2 << 20))),
        ("transferring", paused(PausePoint::BeforeComplete(2))),
        ("stalled", paused(PausePoint::AfterBytes(1 << 20))),
    ];
    for (state, faults) in cases {
        let what = format!("{state}: {faults:?}");
        let idle = if state == "stalled" { 1 } else { 600 };
        let toml = format!("[jobs]\nanswer_within_s = 1\nidle_s = {idle}\n");
        let waits = faults.pause.is_some();
        let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
        let started = rig.start().await;
        if waits {
            rig.paused().await;
        }
        rig.when_in(id_of(&started), state).await;
        let answer = rig.cancel(id_of(&started)).await;
        // Either it is on its way, or it was over before the answer left.
        assert!([200, 202].contains(&answer.status.as_u16()), "{what}: {answer:?}");
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!((&backup["state"], &backup["result"]), (&json!("cancelled"), &json!("cancelled")), "{what}");
        assert_eq!((&backup["status"], &backup["code"]), (&json!("cancelled"), &json!(null)), "{what}");
        assert_eq!(backup["facets"]["snapshot_cleanup"], "alert", "{what}");
        rig.expect_nothing_left(0).await;
        // Again, and again the same.
        let again = rig.cancel(id_of(&started)).await.expect_status(200).json();
        assert_eq!(again, backup, "{what}");
        rig.expect_nothing_left_and_a_backup_works(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_of_what_is_over_or_never_was_says_so() {
    let rig = Rig::new().await;
    let backup = rig.back_up().await;
    let answer = rig.cancel(id_of(&backup)).await.expect_status(200).json();
    assert_eq!(answer["state"], "committed");
    assert_eq!(rig.points().await.len(), 1);
    rig.cancel("backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB").await.expect_problem(404, "backup_not_found");
    rig.cancel("x").await.expect_problem(404, "backup_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_while_the_caller_of_the_start_still_waits_answers_both() {
    let start = StartFault::Hang { launch: false };
    let rig = Rig::faulty(Faults { start, ..Faults::default() }).await;
    let request = rig.service.request(reqwest::Method::POST, "/api/v1/backups/vm").json(&rig.start_body());
    let starting = tokio::spawn(crate::support::send(request));
    let id = rig
        .seen(|event| match event {
            blockyard::node::fake::Event::Called(call) => Some(call.job_id.clone()),
            _ => None,
        })
        .await;
    rig.cancel(&id).await;
    let refused = starting.await.unwrap().expect_problem(409, "backup_ended");
    assert_eq!(refused["backup_id"], id);
    assert_eq!(rig.end_of(&id).await["state"], "cancelled");
    rig.expect_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_many_times_at_once_is_one_cancel() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::AfterBytes(1 << 20)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let path = format!("/api/v1/backups/{}/cancel", id_of(&started));
    let cancels: Vec<_> = (0..10)
        .map(|_| {
            let request = rig.service.request(reqwest::Method::POST, &path).json(&json!({}));
            tokio::spawn(crate::support::send(request))
        })
        .collect();
    for cancel in cancels {
        let answer = cancel.await.unwrap();
        assert!([200, 202].contains(&answer.status.as_u16()), "{answer:?}");
    }
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "cancelled");
    rig.expect_nothing_left_and_a_backup_works(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vm_can_be_backed_up_again_right_after_any_ending() {
    let rig = Rig::with(Plan { toml: "[jobs]\nreconnect_s = 1\n".to_owned(), ..Plan::default() }).await;
    let endings = [
        (Faults::default(), "committed"),
        (Faults { die_after_bytes: Some(1 << 20), ..Faults::default() }, "failed"),
        (Faults { complete: CompleteFault::Early, ..Faults::default() }, "failed"),
        (Faults::default(), "committed"),
    ];
    let mut points = 0;
    for (faults, state) in endings {
        rig.node.reconfigure(|config| config.faults = faults);
        let backup = rig.back_up().await;
        assert_eq!(backup["state"], state, "{backup:#}");
        points += usize::from(state == "committed");
    }
    rig.node.reconfigure(|config| config.faults.start = StartFault::Status { status: 500, launch: false });
    for _ in 0..3 {
        rig.try_start().await.expect_problem(502, "node_rejected");
    }
    rig.expect_nothing_left_and_a_backup_works(points).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn partial_directories_are_never_listed_and_are_gone_after_failure() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::AfterBytes(1 << 20)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    assert_eq!(crate::rig::backup_directories(&rig.repository), [format!("{}.partial", id_of(&started))]);
    assert!(rig.points().await.is_empty());
    rig.cancel(id_of(&started)).await;
    rig.end_of(id_of(&started)).await;
    rig.node.resume();
    rig.expect_nothing_left(0).await;
}
