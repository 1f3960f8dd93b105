"""What a radiographer reads, in Russian or English by locale; no patient, path or content of a file is ever in it."""

import os

REPLACED = "the models were replaced meanwhile; run it again"
PASSING = "no_memory", "crashed", "slow", "network", "unreadable", "internal"  # failures that may not come again
WORDS = {
    # Failures: why a study has no result
    "no_ct": ("the chest is shown, but by no CT series", "грудная клетка есть, но серий КТ нет"),
    "no_chest": (
        "there is CT, but no series shows the chest",
        "КТ есть, но ни одна серия не показывает грудную клетку",
    ),
    "nothing": (
        "neither CT nor chest: nothing in it can be read as a chest CT",
        "нет ни КТ, ни грудной клетки: прочитать как КТ грудной клетки нечего",
    ),
    "only_scouts": (
        "there are only localisers, derived images (MIP, captures) or few images, no series of slices as scanned",
        "есть только топограммы, производные снимки (MIP, снимки экрана) или их мало; серии исходных срезов нет",
    ),
    "few_slices": (
        "the series has {count} along one of its axes, five slices or more are needed",
        "в серии {count} по одной из осей, нужно не меньше пяти срезов",
    ),
    "too_small": (
        "{size} voxels of {spacing} mm are less than one voxel for the network",
        "{size} вокселей по {spacing} мм — меньше одного вокселя для сети",
    ),
    "too_large": (
        "the file declares {shape} voxels, more than any CT series has",
        "в файле заявлено {shape} вокселей — больше, чем бывает в серии КТ",
    ),
    "spacing": (
        "the distance between voxels, {spacing} mm, is impossible",
        "расстояние между вокселями {spacing} мм невозможно",
    ),
    "no_geometry": (
        "images lack their position, orientation or pixel spacing; send the series from the scanner again",
        "в снимках нет положения, ориентации или размера пикселя; отправьте серию с аппарата ещё раз",
    ),
    "mixed": (
        "images of one series differ in size or orientation; send the axial series alone",
        "снимки одной серии различаются размером или ориентацией; отправьте только аксиальную серию",
    ),
    "uneven": (
        "the distances between slices are uneven ({least} to {most} mm)",
        "расстояния между срезами неодинаковы (от {least} до {most} мм)",
    ),
    "shifted": (
        "slices lie up to {most} mm beside the straight line through the others; send one series alone",
        "срезы лежат до {most} мм в стороне от прямой через остальные; отправьте одну серию",
    ),
    "no_orientation": (
        "the NIfTI file does not tell its orientation (sform and qform are 0); convert the DICOM series again",
        "в файле NIfTI нет ориентации (sform и qform равны 0); преобразуйте серию DICOM ещё раз",
    ),
    "forms": (
        "sform and qform of the NIfTI file disagree; convert the DICOM series again",
        "sform и qform файла NIfTI противоречат друг другу; преобразуйте серию DICOM ещё раз",
    ),
    "sheared": (
        "the axes of the NIfTI file are {angle}° from a right angle; this network reads straight slices",
        "оси файла NIfTI отклонены от прямого угла на {angle}°; сеть читает прямые срезы",
    ),
    "ambiguous": (
        "the series holds different images of the same places that nothing tells apart; send one acquisition alone",
        "в серии разные снимки одних и тех же мест, и различить их нечем; отправьте одну серию сбора данных",
    ),
    "bad_rescale": (
        "RescaleSlope or RescaleIntercept cannot be read, so the densities are unknown; send the series again",
        "RescaleSlope или RescaleIntercept не читается, плотности неизвестны; отправьте серию ещё раз",
    ),
    "short": (
        "the series covers only {covered} mm; send the whole chest",
        "серия охватывает только {covered} мм; отправьте всю грудную клетку",
    ),
    "no_hounsfield": (
        "the values are no Hounsfield units ({least} to {most}, {share} % of them beyond 3071); send the CT as scanned",
        "значения — не числа Хаунсфилда (от {least} до {most}, {share} % выше 3071); отправьте КТ как снято",
    ),
    "gaps": (
        "{share} % of the slices are missing; send the series again",
        "нет {share} % срезов; отправьте серию ещё раз",
    ),
    "tilt_failure": (
        "the gantry was tilted by {angle}°; this network reads straight slices",
        "гентри наклонён на {angle}°; сеть читает прямые срезы",
    ),
    "damaged": (
        "{count} images are damaged or cut short; send the series again",
        "повреждены или обрезаны снимки: {count}; отправьте серию ещё раз",
    ),
    "compression": (
        "images are compressed in a way that is not read here ({syntax}); send them uncompressed",
        "снимки сжаты способом, который здесь не читается ({syntax}); отправьте без сжатия",
    ),
    "unreadable": (
        "the study cannot be read: no permission, or the disk fails",
        "исследование не читается: нет прав доступа или отказ диска",
    ),
    "bad_archive": (
        "the archive is damaged or cut short; pack or copy it again",
        "архив повреждён или обрезан; упакуйте или скопируйте его ещё раз",
    ),
    "locked_archive": (
        "the archive has a password; pack it without one",
        "архив с паролем; упакуйте его без пароля",
    ),
    "unknown_archive": (
        "archives of this kind ({kind}) are not read; pack it as zip or tar.gz",
        "архивы этого вида ({kind}) не читаются; упакуйте в zip или tar.gz",
    ),
    "split_archive": (
        "it is one part of a split archive; join the parts and pack them as one zip or tar.gz",
        "это часть разделённого архива; соедините части и упакуйте в один zip или tar.gz",
    ),
    "too_deep": (
        "archives lie in archives more than {count} deep; unpack the outer ones",
        "архивы вложены глубже {count} уровней; распакуйте внешние",
    ),
    "zip_method": (
        "the archive is packed by a method that is not read here ({kind}); pack it with Deflate",
        "архив упакован способом, который здесь не читается ({kind}); упакуйте его способом Deflate",
    ),
    "unknown_volume": (
        "files of this kind ({kind}) are not read; send DICOM or NIfTI",
        "файлы этого вида ({kind}) не читаются; отправьте DICOM или NIfTI",
    ),
    "unknown_file": (
        "the file is neither DICOM nor NIfTI nor an archive",
        "файл — не DICOM, не NIfTI и не архив",
    ),
    "archive_bomb": (
        "the archive unpacks to more than a study can be ({what}); nothing was unpacked",
        "архив распаковывается в большее, чем бывает исследование ({what}); он не распакован",
    ),
    "bad_nifti": (
        "the NIfTI file is damaged or cut short, or it is none; copy it again",
        "файл NIfTI повреждён или обрезан, или это не NIfTI; скопируйте его ещё раз",
    ),
    "no_pair": (
        "of a NIfTI image in two files, .hdr and .img, one is missing; send both",
        "от изображения NIfTI из двух файлов, .hdr и .img, есть только один; отправьте оба",
    ),
    "no_densities": (
        "the voxels of the NIfTI file are {kind}, no densities; send the CT itself",
        "воксели файла NIfTI — {kind}, а не плотности; отправьте саму КТ",
    ),
    "dimensions": (
        "the NIfTI file has {count} dimensions, a CT volume has 3",
        "в файле NIfTI измерений: {count}, у объёма КТ их 3",
    ),
    "no_memory": ("there is not enough memory for this study", "для этого исследования не хватает памяти"),
    "crashed": (
        "reading or computing it broke the program, which went on with the next study",
        "на нём программа аварийно прервалась и перешла к следующему исследованию",
    ),
    "slow": (
        "reading or computing it took more than {minutes} minutes and was broken off",
        "чтение или расчёт заняли больше {minutes} мин и были прерваны",
    ),
    "network": (
        "the networks gave no result for it ({what})",
        "сети не дали для него результата ({what})",
    ),
    "internal": (
        "an error of this program ({what}); report it to its authors",
        "ошибка этой программы ({what}); сообщите авторам",
    ),
    # Warnings: a result, but look
    "skipped_files": (
        "{count} files are no readable DICOM and were skipped",
        "пропущены файлы, которые не читаются как DICOM: {count}",
    ),
    "missing": ("about {share} % of the slices are missing", "не хватает около {share} % срезов"),
    "filled": (
        "{count} gaps between slices were filled from their neighbours",
        "пропуски между срезами заполнены по соседним: {count}",
    ),
    "duplicates": ("{count} duplicates of slices were left out", "отброшены повторы срезов: {count}"),
    "damaged_images": (
        "{count} images are damaged; their places were filled from other copies or neighbours, or cut off at the ends",
        "повреждены снимки: {count}; их места заполнены по копиям или соседним срезам либо отрезаны по краям",
    ),
    "far": (
        "{count} slices that lie far from the others, beside them or between their places were left out",
        "отброшены срезы, лежащие далеко от остальных, в стороне от них или между их местами: {count}",
    ),
    "other_geometry": (
        "{count} images of the series were left out: of another size or orientation, or without a position",
        "отброшены снимки серии другого размера, другой ориентации или без положения: {count}",
    ),
    "acquisitions": (
        "the series holds {count} acquisitions or reconstructions (they differ in {tags}); "
        "one of {slices} images was taken, by coverage, distance of slices, window and kernel",
        "в серии несколько сборов данных или реконструкций: {count} (различаются {tags}); "
        "взята одна из {slices} снимков — по охвату, расстоянию между срезами, окну и ядру",
    ),
    "partly": (
        "the series covers only {covered} mm, less than a chest",
        "серия охватывает только {covered} мм — меньше грудной клетки",
    ),
    "clipped": (
        "{share} % of the voxels are above 1000 HU and were clipped there",
        "выше 1000 HU лежит {share} % вокселей, они обрезаны",
    ),
    "no_slope": ("RescaleSlope is missing or 0, 1 was taken", "RescaleSlope нет или он 0, взят 1"),
    "no_intercept": ("RescaleIntercept is missing, 0 was taken", "нет RescaleIntercept, взят 0"),
    "monochrome1": (
        "images are marked to be shown inverted; Hounsfield units were taken as stored",
        "снимки помечены для показа в негативе; числа Хаунсфилда взяты как записаны",
    ),
    "turned": (
        "the volume lies {angle}° askew to the patient's axes and is read as if it were straight",
        "объём повёрнут на {angle}° к осям пациента и читается как прямой",
    ),
    "tilt": ("the gantry was tilted by {angle}°", "гентри наклонён на {angle}°"),
    "no_air": (
        "nothing in it is as thin as air or lung (below -500 HU): these may be no Hounsfield units",
        "в нём нет ничего разреженного, как воздух или лёгкое (ниже -500 HU): возможно, это не числа Хаунсфилда",
    ),
    "too_dense": (
        "{share} % of the voxels are beyond {most} HU: these may be no Hounsfield units",
        "выше {most} HU лежит {share} % вокселей: возможно, это не числа Хаунсфилда",
    ),
    "shear": (
        "the axes of the NIfTI file are {angle}° from a right angle",
        "оси файла NIfTI отклонены от прямого угла на {angle}°",
    ),
    "passed_over": (
        "a series of the chest that comes first was passed over: {why}",
        "серия грудной клетки, которая идёт первой, пропущена: {why}",
    ),
    "several_studies": (
        "it holds {count} studies, one series was taken",
        "внутри исследований: {count}, взята одна серия",
    ),
    "unchecked": (
        "NIfTI is taken as it is: nobody checked that it shows the chest",
        "NIfTI берётся как есть: что это грудная клетка, не проверено",
    ),
    "units": (
        "the NIfTI file is marked with units that make it impossible; mm were taken",
        "с единицами, указанными в файле NIfTI, он невозможен; взяты мм",
    ),
    "several_volumes": (
        "it holds {count} NIfTI volumes, one was taken",
        "внутри объёмов NIfTI: {count}, взят один",
    ),
    "unread": (
        "{count} archives in it could not be read and were left out",
        "внутри есть архивы, которые не прочитаны: {count}",
    ),
    "copies": (
        "the same volume lies in {count} more places of INPUT; this row stands for all",
        "тот же объём лежит в INPUT ещё в других местах: {count}; эта строка — за все",
    ),
    "not_numbers": ("{count} voxels are no numbers and count as air", "воксели без числа сочтены воздухом: {count}"),
    # The rest of the output
    "synthetic": (
        "SYNTHETIC WEIGHTS: these results mean nothing and are for tests alone",
        "СИНТЕТИЧЕСКИЕ ВЕСА: эти результаты ничего не значат и годятся только для проверки",
    ),
    "unknown_weights": (
        "whether the weights are real or synthetic could not be found out",
        "настоящие веса или синтетические — узнать не удалось",
    ),
    "choice": (
        "chosen of {count} volumes of CT: what a chest measures is covered ({covered} mm), "
        "then the closest slices ({step} mm), the thinnest, soft-tissue window and kernel",
        "выбрана из объёмов КТ: {count}; сначала охват ({covered} мм), "
        "затем частые срезы ({step} мм), тонкие, мягкотканное окно и ядро",
    ),
    "only_choice": (
        "the only volume of CT: {covered} mm in slices {step} mm apart",
        "единственный объём КТ: {covered} мм, срезы через {step} мм",
    ),
    "nifti_choice": (
        "chosen of {count} NIfTI volumes: no mask, in the fewest folders, {covered} mm covered, slices {step} mm apart",
        "выбран из объёмов NIfTI: {count}; не маска, ближе к началу папок, охват {covered} мм, срезы через {step} мм",
    ),
    "row": ("row {row}: {level}: {text}", "строка {row}: {level}: {text}"),
    "error": ("error", "ошибка"),
    "warning": ("warning", "предупреждение"),
    "none_wrong": ("no warnings and no errors", "предупреждений и ошибок нет"),
    "progress": (
        "{done} of {total} studies, {failed} failed, {left} s left",
        "исследований: {done} из {total}, с ошибкой {failed}, осталось {left} с",
    ),
    "shared_memory": (
        "{triton}: volumes are handed over through shared memory",
        "{triton}: объёмы передаются через разделяемую память",
    ),
    "messages": (
        "{triton}: volumes are handed over in messages of gRPC",
        "{triton}: объёмы передаются сообщениями gRPC",
    ),
    "locked": (
        "{triton}: volumes are handed over in messages of gRPC; through shared memory it would take less, but for "
        "that the server asks for its key: CHEST_KEY=… make infer",
        "{triton}: объёмы передаются сообщениями gRPC; через разделяемую память было бы быстрее, но для неё "
        "сервер спрашивает ключ: CHEST_KEY=… make infer",
    ),
    "summary": (
        "{total} studies: {good} succeeded, {failed} failed, {skipped} were in the output before; see {out}",
        "исследований: {total}; успешно {good}, с ошибкой {failed}, уже были в результатах {skipped}; см. {out}",
    ),
}


def is_russian() -> bool:
    """Whether the locale is Russian: the first of LC_ALL, LC_MESSAGES and LANG that is set decides."""
    values = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return next(filter(None, values), "").lower().startswith("ru")


def translate(key: str, **values: object) -> str:
    return WORDS[key][is_russian()].format(**values)


class StudyError(Exception):
    """Why a study has no result: a sentence for its radiographer."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(translate(key, **values))
        self.key = key
