//! Libraries that are loaded and attached in one step.

use core::ffi::{CStr, c_void};
use core::ptr::NonNull;
use std::borrow::ToOwned;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::string::{String, ToString};

use super::error::LoadError;
use super::host::{Area, Attached, attach};
use super::{Placement, SYMBOL};

/// A library that is loaded and attached: a module at work. Detached and closed when dropped.
///
/// See [`mod@crate::module`] for an example of both sides.
#[derive(Debug)]
#[must_use = "the library is closed when this is dropped"]
pub struct Module {
    // Dropped in this order.
    attached: Attached,
    handle: Handle,
}

impl Module {
    /// Loads a library and attaches it. A name without a slash is looked for where the system keeps libraries.
    ///
    /// A library that is loaded already is not loaded anew; it goes when the last of its `Module`s is dropped.
    ///
    /// # Errors
    /// [`LoadError`]; the library is closed again.
    ///
    /// # Panics
    /// If the process's instance cannot be set up.
    ///
    /// # Safety
    /// - What the library runs when it is loaded and closed is sound.
    /// - When the last `Module` of the library is dropped nothing of the library is in use: no thread is in its code, and
    ///   nobody keeps a function of it, a handle or a reference to one of its variables.
    pub unsafe fn load(path: impl AsRef<Path>, placement: Placement) -> Result<Self, LoadError> {
        let path = path.as_ref();
        // SAFETY: the promise of the caller.
        let handle = unsafe { Handle::open(path)? };
        let table = handle.symbol(SYMBOL).ok_or_else(|| LoadError::NotAModule {
            path: path.to_owned(),
        })?;
        // SAFETY: a symbol of that name is a module's table; the library stays mapped until `handle` is dropped, which is
        // after the result; the rest is promised by the caller.
        let attached = unsafe { attach(table.as_ptr().cast(), placement) };
        let attached = attached.map_err(|error| LoadError::Attach {
            path: path.to_owned(),
            error,
        })?;
        Ok(Self { attached, handle })
    }

    /// The address of what the library exports by this name; `None` if it exports no such thing.
    pub fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        self.handle.symbol(name)
    }

    /// Where its static per-CPU variables lie; `None` if it has none.
    pub fn area(&self) -> Option<Area> {
        self.attached.area()
    }
}

/// A library that the system has opened for us; closed when dropped.
#[derive(Debug)]
struct Handle(NonNull<c_void>);

// SAFETY: the system's functions for libraries may be called from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// # Safety
    /// What the library runs when it is loaded and closed is sound.
    unsafe fn open(path: &Path) -> Result<Self, LoadError> {
        let refused = |reason| LoadError::Open {
            path: path.to_owned(),
            reason,
        };
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| refused("the name has a byte of 0".to_string()))?;
        // SAFETY: a name that ends with 0; the rest is promised by the caller.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        match NonNull::new(handle) {
            Some(handle) => Ok(Self(handle)),
            None => Err(refused(last_error())),
        }
    }

    fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the library is open.
        NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: open until now. There is nothing to be done if the system cannot close it: it stays.
        unsafe { libc::dlclose(self.0.as_ptr()) };
    }
}

/// What the system says about the calling thread's last attempt.
fn last_error() -> String {
    // SAFETY: the message is the thread's own until its next call.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "the system gives no reason".to_string();
    }
    // SAFETY: not null, so it is a string.
    let message = unsafe { CStr::from_ptr(message) };
    message.to_string_lossy().into_owned()
}
