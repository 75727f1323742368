// What this library was built for, readable from the file without loading it (`python -m rlkern`).
#define RLK_STRING_OF(x) #x
#define RLK_STRING(x) RLK_STRING_OF(x)

extern "C" __attribute__((used)) const char rlkern_cuda_archs[] =
    "rlkern_cuda_archs=" RLK_STRING(RLKERN_CUDA_ARCHS) ";";
