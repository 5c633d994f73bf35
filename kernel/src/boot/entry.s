# The PVH entry. Intel syntax.

.section .note.Xen, "a", @note
.balign 4
.long 4, 8, 18                  # length of the name, of the value; type: the 32-bit entry
.asciz "Xen"
.quad pvh_entry

.section .bss.boot_tables, "aw", @nobits
.balign 4096
.globl boot_pml4
boot_pml4:          .skip 4096
boot_image_pdpt:    .skip 4096
boot_image_pd:      .skip 4096
boot_image_pts:     .skip 4096 * 4      # the image lies below 8 MiB
boot_physical_pdpt: .skip 4096
boot_physical_pds:  .skip 4096 * 4      # 4 GiB in pages of 2 MiB

.section .rodata.boot_gdt, "a", @progbits
.balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 08: code, 64 bits
    .quad 0x00cf93000000ffff    # 10: data
boot_gdt_pointer:
    .word boot_gdt_pointer - boot_gdt - 1
    .quad boot_gdt

# Bits of a page table entry; the bit against execution is the highest of the upper half.
.set PRESENT, 1
.set WRITE, 2
.set LARGE, 0x80
.set NO_EXECUTE, 0x80000000

.section .text.boot, "ax", @progbits
.code32
.globl pvh_entry
pvh_entry:
    cli
    cld
    mov esp, offset __boot_stack_end

    # The image, page by page: what to map, and how.
    mov eax, offset __text_start
    mov edx, offset __text_end
    mov ecx, PRESENT
    xor esi, esi
    call map_image_pages
    mov esi, NO_EXECUTE
    mov eax, offset __rodata_start
    mov edx, offset __rodata_end
    call map_image_pages
    mov eax, offset __per_cpu_start
    mov edx, offset __image_end
    call map_image_pages
    mov ecx, PRESENT | WRITE
    mov eax, offset __data_start
    mov edx, offset __data_end
    call map_image_pages
    mov eax, offset __boot_stack_start
    mov edx, offset __boot_stack_end
    call map_image_pages

    # 4 GiB of physical memory in large pages.
    xor eax, eax
    mov edi, offset boot_physical_pds
1:  mov edx, eax
    or edx, PRESENT | WRITE | LARGE
    mov [edi], edx
    mov dword ptr [edi + 4], NO_EXECUTE
    add edi, 8
    add eax, 0x200000
    jnc 1b

    # The tables above: their entries restrict nothing.
    mov edi, offset boot_image_pd
    mov eax, offset boot_image_pts + PRESENT + WRITE
    mov ecx, 4
    call point_to_tables
    mov edi, offset boot_physical_pdpt
    mov eax, offset boot_physical_pds + PRESENT + WRITE
    mov ecx, 4
    call point_to_tables
    mov dword ptr [boot_image_pdpt], offset boot_image_pd + PRESENT + WRITE
    mov dword ptr [boot_pml4], offset boot_image_pdpt + PRESENT + WRITE
    mov dword ptr [boot_pml4 + 256 * 8], offset boot_physical_pdpt + PRESENT + WRITE

    mov eax, offset boot_pml4
    call enter_long_mode
    lgdt [boot_gdt_pointer]
    jmp 0x08, offset start_64

# Maps the image's pages from eax to edx to themselves, with flags esi:ecx.
map_image_pages:
1:  cmp eax, edx
    jae 2f
    mov edi, eax
    shr edi, 9                  # page number * 8
    mov ebp, eax
    or ebp, ecx
    mov [boot_image_pts + edi], ebp
    mov [boot_image_pts + edi + 4], esi
    add eax, 4096
    jmp 1b
2:  ret

# Points ecx entries from edi on to the tables from eax on.
point_to_tables:
1:  mov [edi], eax
    add edi, 8
    add eax, 4096
    loop 1b
    ret

# Turns on paging with the tables at eax, 64-bit mode (in effect with the next far jump), and what all CPUs need alike:
# write protection and no-execute also for the kernel, SSE, the syscall instruction. Changes eax, ecx, edx.
enter_long_mode:
    mov cr3, eax
    mov eax, cr4
    or eax, 0x620               # PAE, FXSAVE, SIMD exceptions
    mov cr4, eax
    mov ecx, 0xc0000080         # EFER
    rdmsr
    or eax, 0x901               # no-execute, long mode, syscall
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffffb         # caches on, no emulation of the FPU
    or eax, 0x80010023          # paging, write protection, native FPU errors, FPU monitoring, protection
    mov cr0, eax
    ret

.code64
start_64:
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    mov edi, ebx                # the start info
    xor ebp, ebp
    call {kernel_main}
    ud2
