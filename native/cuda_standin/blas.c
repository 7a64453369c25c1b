/* libcublas: the functions that ggml-cuda calls, which do nothing and succeed.  They are named here and not declared,
   since cublas_v2.h declares them with other types; nobody looks at their arguments. */

int cublasCreate_v2(void ** handle) {
    static int one;
    *handle = &one;
    return 0;
}
const char * cublasGetStatusString(int status) {
    return status ? "an error of the stand-in" : "success";
}
int cublasDestroy_v2(void) {
    return 0;
}
int cublasSetWorkspace_v2(void) {
    return 0;
}
int cublasSetStream_v2(void) {
    return 0;
}
int cublasSetMathMode(void) {
    return 0;
}
int cublasSgemm_v2(void) {
    return 0;
}
int cublasSgemmBatched(void) {
    return 0;
}
int cublasSgemmStridedBatched(void) {
    return 0;
}
int cublasGemmEx(void) {
    return 0;
}
int cublasGemmBatchedEx(void) {
    return 0;
}
int cublasGemmStridedBatchedEx(void) {
    return 0;
}
int cublasStrsmBatched(void) {
    return 0;
}
