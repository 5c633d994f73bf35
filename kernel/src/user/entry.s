# To ring 3 and back. Intel syntax.

.section .text.user, "ax", @progbits

# extern "C" fn enter_user(entry, stack, data) -> status: returns when the user exits.
.globl enter_user
enter_user:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    cli
    mov gs:[rip + {stack_pointers}], rsp
    mov rcx, rdi                    # sysret goes there
    mov r11d, 0x202                 # with these flags: interrupts
    mov rdi, rdx
    mov rdx, rsi
    jmp to_user

# `syscall` arrives here with the user's stack and GS base, interrupts masked.
.globl syscall_entry, sysret_window
syscall_entry:
    swapgs
    mov gs:[rip + {stack_pointers} + 8], rsp
    mov rsp, gs:[rip + {stack_pointers}]
    test rax, rax
    jz exit_user
    push rcx
    push r11
    push qword ptr gs:[rip + {stack_pointers} + 8]
    mov rsi, rdi
    mov rdi, rax
    call {system_call}              # the stack is at a multiple of 16: 6 + 3 words below a return address
    pop rdx
    pop r11
    pop rcx
to_user:
    mov rsp, rdx
    swapgs
sysret_window:
    sysretq

# System call 0: back to whoever called enter_user.
exit_user:
    mov rax, rdi
    sti
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
