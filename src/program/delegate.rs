//! `NetworkBehaviour` for behaviours that wrap another one.

/// Implements methods of `NetworkBehaviour` by a call of the same method of a field.
///
/// `delegate_behaviour!(kad: handle_established_inbound_connection);` stands in an `impl NetworkBehaviour for …`
/// whose other methods do more. `|handler| …;` after the field converts the handler of a new connection.
macro_rules! delegate_behaviour {
    ($field:tt: $($method:ident),+) => {
        $crate::program::delegate::delegate_behaviour!($field |handler| handler; $($method),+);
    };
    ($field:tt |$handler:ident| $convert:expr; $($method:ident),+) => {
        $($crate::program::delegate::delegate_behaviour!(@ $field |$handler| $convert, $method);)+
    };
    (@ $field:tt |$handler:ident| $convert:expr, handle_established_inbound_connection) => {
        fn handle_established_inbound_connection(
            &mut self,
            id: ConnectionId,
            peer: PeerId,
            local: &Multiaddr,
            remote: &Multiaddr,
        ) -> Result<THandler<Self>, ConnectionDenied> {
            let $handler =
                self.$field.handle_established_inbound_connection(id, peer, local, remote)?;
            Ok($convert)
        }
    };
    (@ $field:tt |$handler:ident| $convert:expr, handle_established_outbound_connection) => {
        fn handle_established_outbound_connection(
            &mut self,
            id: ConnectionId,
            peer: PeerId,
            address: &Multiaddr,
            role: Endpoint,
            port_use: PortUse,
        ) -> Result<THandler<Self>, ConnectionDenied> {
            let $handler = self
                .$field
                .handle_established_outbound_connection(id, peer, address, role, port_use)?;
            Ok($convert)
        }
    };
    (@ $field:tt |$handler:ident| $convert:expr, on_connection_handler_event) => {
        fn on_connection_handler_event(
            &mut self,
            peer: PeerId,
            id: ConnectionId,
            event: THandlerOutEvent<Self>,
        ) {
            self.$field.on_connection_handler_event(peer, id, event);
        }
    };
}

pub(crate) use delegate_behaviour;
