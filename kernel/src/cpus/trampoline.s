# Where the other CPUs begin: copied to physical page 8, entered in 16-bit code. Intel syntax.
#
# They change to 32-bit code, use the boot processor's way into 64-bit mode with the kernel's own page tables, and take the
# stack that is prepared for their APIC id.

.section .rodata.trampoline, "a", @progbits
.balign 16
.globl trampoline_start, trampoline_end, trampoline_root
trampoline_start:
.code16
    cli
    cld
    xor ax, ax
    mov ds, ax
    lgdt [GDT_POINTER_AT]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                    # a far jump with a 32-bit offset
    .long 0x8000 + trampoline_32 - trampoline_start
    .word 0x18

.code32
trampoline_32:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, [ROOT_AT]
    mov cr3, eax
    mov eax, cr4
    or eax, 0x620                       # as in enter_long_mode, which needs a stack to return
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x901
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffffb
    or eax, 0x80010023
    mov cr0, eax
    .byte 0xea
    .long 0x8000 + trampoline_64 - trampoline_start
    .word 0x08

.code64
trampoline_64:
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    mov eax, 1
    cpuid
    shr ebx, 24                         # the APIC id
    mov edi, ebx
    mov rsp, {ap_stacks}[rbx * 8]
    xor ebp, ebp
    mov rax, offset {ap_main}
    call rax
    ud2

.balign 8
trampoline_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 08: code, 64 bits
    .quad 0x00cf93000000ffff            # 10: data
    .quad 0x00cf9b000000ffff            # 18: code, 32 bits
trampoline_gdt_pointer:
    .word trampoline_gdt_pointer - trampoline_gdt - 1
    .long 0x8000 + trampoline_gdt - trampoline_start
trampoline_root:
    .long 0
trampoline_end:

.set GDT_POINTER_AT, 0x8000 + (trampoline_gdt_pointer - trampoline_start)
.set ROOT_AT, 0x8000 + (trampoline_root - trampoline_start)
