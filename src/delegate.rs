//! `AsyncWrite` for streams that wrap another one.

/// Implements methods of `AsyncWrite` by a call of the same method of a field.
///
/// `delegate_write!(stream: poll_flush, poll_close);` goes into an `impl AsyncWrite for …` whose other
/// methods, if there are any, do more. Without `poll_write_vectored` in the list the trait's default holds, which writes
/// the first buffer that is not empty.
macro_rules! delegate_write {
    ($field:ident: $($method:ident),+) => {
        $($crate::delegate::delegate_write!(@ $field $method);)+
    };
    (@ $field:ident poll_write) => {
        $crate::delegate::delegate_write!(@ $field poll_write(bytes: &[u8]) -> usize);
    };
    (@ $field:ident poll_write_vectored) => {
        $crate::delegate::delegate_write!(
            @ $field poll_write_vectored(buffers: &[std::io::IoSlice<'_>]) -> usize
        );
    };
    (@ $field:ident $method:ident) => {
        $crate::delegate::delegate_write!(@ $field $method() -> ());
    };
    (@ $field:ident $method:ident($($data:ident: $type:ty)?) -> $output:ty) => {
        fn $method(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
            $($data: $type)?
        ) -> std::task::Poll<std::io::Result<$output>> {
            std::pin::Pin::new(&mut self.$field).$method(cx, $($data)?)
        }
    };
}

pub(crate) use delegate_write;
