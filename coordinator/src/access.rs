//! Who may reach a coordinator, and how.

use security::ServerTls;
use std::net::SocketAddr;
use std::sync::Arc;

/// How a coordinator lets clients in. By default: in plaintext, whoever reaches it.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Its certificate; `None`: connections are not encrypted.
    pub tls: Option<Arc<ServerTls>>,
    /// Whether it also serves in plaintext on a free port of this machine, for what else runs here.
    pub also_local: bool,
}

impl Access {
    /// The address of a server at `address`, as clients write it.
    pub fn url(&self, address: SocketAddr) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{address}")
    }
}
