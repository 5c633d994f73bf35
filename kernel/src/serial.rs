//! The console: the first serial port.

use core::fmt::{self, Write};

use lock_api::Mutex;
use pcpu::this_cpu::gs::IrqLock;
use uart_16550::backend::PioBackend;
use uart_16550::{Config, Uart16550};
use x86_64::instructions::interrupts;

const COM1: u16 = 0x3f8;

static PORT: Mutex<IrqLock, Option<Port>> = Mutex::new(None);

struct Port(Uart16550<PioBackend>);

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.send_bytes_exact(text.as_bytes());
        Ok(())
    }
}

/// Makes the port ready; until then what is printed is lost.
pub fn init() {
    // SAFETY: the port is that of the first UART of every PC, and only `PORT` has it.
    let Ok(mut uart) = (unsafe { Uart16550::new_port(COM1) }) else {
        return;
    };
    if uart.init(Config::default()).is_ok() {
        *PORT.lock() = Some(Port(uart));
    }
}

/// Prints; called by the macros [`print!`](crate::print) and [`println!`](crate::println).
pub fn print(text: fmt::Arguments<'_>) {
    if let Some(port) = PORT.lock().as_mut() {
        // A port takes everything.
        let _ = port.write_fmt(text);
    }
}

/// Lets a panic print although somebody, possibly the panicking CPU itself, holds the port.
pub fn break_lock() {
    if PORT.is_locked() {
        // SAFETY: the machine is about to end; at worst two texts are mixed.
        unsafe { PORT.force_unlock() };
        // The holder may have had them enabled.
        interrupts::disable();
    }
}

/// Prints to the serial port.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::serial::print(format_args!($($arg)*)) };
}

/// Prints a line to the serial port.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => { $crate::serial::print(format_args!("{}\n", format_args!($($arg)*))) };
}
