//! Time that does not pass as it should, and a relay that starts anew under all of its clients.

mod common;

#[path = "time/restart.rs"]
mod restart;
#[path = "time/stood_still.rs"]
mod stood_still;

use common::process;

#[tokio::test]
#[ignore = "not a test: the client that the tests start"]
async fn a_client() {
    process::a_client().await;
}
