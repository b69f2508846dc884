import unittest

from compare.stubs import (installed_libraries, missing_functions, needed_libraries, source,
                           symbols, version_script)


class Stubs(unittest.TestCase):
    def test_needed_libraries_are_read_from_readelf(self):
        text = " 0x1 (NEEDED)   Shared library: [libnccl.so.2]\n 0xe (SONAME) soname: [libx.so]\n"
        self.assertEqual(needed_libraries(text), {"libnccl.so.2"})

    def test_symbols_are_split_from_their_versions(self):
        text = ("                 U cudaFree@libcudart.so.13\n"
                "                 U ncclSend\n"
                "                 w _ITM_registerTMCloneTable\n"
                "0000000000001000 T mine@@V1\n")
        undefined, defined = symbols(text)
        self.assertEqual(undefined, {("cudaFree", "libcudart.so.13"), ("ncclSend", "")})
        self.assertEqual(defined, {"mine"})

    def test_what_the_system_or_torch_has_is_not_made(self):
        undefined = {("cudaFree", "libcudart.so.13"), ("memcpy", "GLIBC_2.14"),
                     ("PyList_New", ""), ("here", "")}
        names, versions = missing_functions(undefined, {"here"})
        self.assertEqual((names, versions), ({"cudaFree"}, {"libcudart.so.13"}))

    def test_every_name_becomes_a_function(self):
        self.assertIn("long cudaFree(void)", source({"cudaFree"}))

    def test_versions_go_to_their_library(self):
        versions = {"libcudart.so.13", "libcublas.so.13", "NVSHMEM"}
        self.assertEqual(version_script("libcudart.so.13", versions), "libcudart.so.13 { };\n")
        self.assertEqual(version_script("libnvshmem_host.so.3", versions), "NVSHMEM { };\n")

    def test_installed_libraries_are_read_from_ldconfig(self):
        text = "\tlibz.so.1 (libc6,x86-64) => /lib/libz.so.1\n"
        self.assertEqual(installed_libraries(text), {"libz.so.1": "/lib/libz.so.1"})


if __name__ == "__main__":
    unittest.main()
