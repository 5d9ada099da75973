//! A text on the web by its address, such as a catalogue of prices.

use crate::client::{MOST_REDIRECTS, PATIENCE};
use crate::error::{HubError, Result};
use ureq::Agent;

/// Bytes of a text at most.
const MOST_BYTES: u64 = 64 << 20;

/// The text at an address, http:// or https://. No token goes with the request.
///
/// # Errors
/// Nobody answers there, or not with a UTF-8 text of at most 64 MiB.
pub fn page(address: &str) -> Result<String> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(MOST_REDIRECTS)
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .user_agent(concat!("lorafleet/", env!("CARGO_PKG_VERSION")))
        .build();
    let unavailable = |error: ureq::Error| {
        let problem = format!("cannot be reached ({error})");
        HubError::unavailable(
            address,
            problem,
            "check the network, or download it yourself and name the file",
        )
    };
    let mut response = config.new_agent().get(address).call().map_err(unavailable)?;
    let status = response.status();
    if !status.is_success() {
        let problem = format!("was answered with {status}");
        return Err(match status.as_u16() {
            429 | 500.. => HubError::unavailable(address, problem, "try again later"),
            _ => HubError::repo(address, problem, "correct the address"),
        });
    }
    // Unreadable bytes are refused, not replaced.
    let bytes = response.body_mut().with_config().limit(MOST_BYTES).read_to_vec().map_err(unavailable)?;
    String::from_utf8(bytes).map_err(|_| HubError::repo(address, "is no UTF-8 text", "correct the address"))
}
